"""Measuring in interleaved rounds, each measurement in a fresh process, and what the numbers say."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

__all__ = [
    "MeasurementFailed",
    "Spread",
    "collect",
    "failures",
    "format_ratio",
    "format_table",
    "interleave",
    "machine",
    "measure",
    "progress",
    "ratios",
    "versions",
    "write_json",
]

REFERENCE = "stock"
_ROOT = Path(__file__).resolve().parent.parent


#: The failed measurements of a run; the run goes on.
failures: list[str] = []


class MeasurementFailed(Exception):
    """A measuring process ended badly, or not in time."""


def measure(module: str, settings: Mapping[str, Any], *, env: Mapping[str, str | None], timeout: float) -> Any:
    """Run ``python -m module --measure settings`` and return the JSON of the last line."""
    environment = dict(os.environ)
    for name, value in env.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    command = [sys.executable, "-m", module, "--measure", json.dumps(settings)]
    try:
        done = subprocess.run(
            command, cwd=_ROOT, env=environment, timeout=timeout, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        raise MeasurementFailed(f"{settings}: not done after {timeout:.0f} s") from None
    if done.returncode:
        raise MeasurementFailed(f"{settings}: exit status {done.returncode}\n{done.stderr[-2_000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def collect(measurements: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return all measurements, or after Ctrl-C the finished measurements."""
    collected = []
    try:
        for measurement in measurements:
            collected.append(measurement)  # noqa: PERF402 - what there is must be kept
    except KeyboardInterrupt:
        print("\nstopped early", file=sys.stderr)
    return collected


def interleave(variants: Sequence[str], rounds: int) -> Iterator[tuple[int, list[str]]]:
    """Each round's number and its order of variants: every variant is first, second, … equally often."""
    for number in range(rounds):
        turn = number % len(variants)
        yield number, [*variants[turn:], *variants[:turn]]


class Spread:
    """A median and its quartiles."""

    def __init__(self, values: Iterable[float]) -> None:
        self.values = sorted(values)
        self.median = median(self.values)
        if len(self.values) > 1:
            self.low, _, self.high = quantiles(self.values, n=4, method="inclusive")
        else:
            self.low = self.high = self.median

    def as_dict(self) -> dict[str, float]:
        """For the JSON."""
        return {
            "median": self.median,
            "q1": self.low,
            "q3": self.high,
            "min": self.values[0],
            "max": self.values[-1],
        }

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} [{self.low:{spec}} … {self.high:{spec}}]"


def ratios(
    measurements: Iterable[Mapping[str, Any]], variant: str, key: str, *, reference: str = REFERENCE
) -> Spread | None:
    """The ratio of ``variant`` to stock in each round that has both, as a spread; None without any."""
    by_round: dict[int, dict[str, float]] = {}
    for measurement in measurements:
        by_round.setdefault(measurement["round"], {})[measurement["variant"]] = measurement[key]
    values = [one[variant] / one[reference] for one in by_round.values() if variant in one and reference in one]
    return Spread(values) if values else None


def format_ratio(ratio: Spread | None, variant: str, *, reference: str = REFERENCE) -> str:
    """A ratio for a table; nothing for stock's ratio to itself."""
    return "" if ratio is None or variant == reference else f"{ratio:.2f}"


def machine() -> dict[str, Any]:
    """Return the properties of the machine."""
    found = {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average_1m": round(os.getloadavg()[0], 2),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    return found


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def versions(**others: str | None) -> dict[str, str | None]:
    """Return the versions of Python and of the packages; ``others`` has the versions of servers."""
    found: dict[str, str | None] = {"python": f"{platform.python_implementation()} {platform.python_version()}"}
    for package in ("dramatiq", "dramatiq-policies", "redis", "hiredis", "pika"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["commit"] = _commit()
    return {**found, **others}


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(path: str | Path, benchmark: str, *, measurements: Sequence[Any], **content: Any) -> None:
    """Write the measurements, one a line, with the date."""
    record = {"benchmark": benchmark, "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), **content}
    lines = ",\n  ".join(json.dumps(_rounded(measurement)) for measurement in measurements)
    text = json.dumps(record, indent=1).removesuffix("\n}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(f'{text},\n "measurements": [\n  {lines}\n ]\n}}\n', encoding="utf-8")


def _rounded(measurement: Mapping[str, Any]) -> dict[str, Any]:
    return {key: round(value, 2) if isinstance(value, float) else value for key, value in measurement.items()}


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def progress(text: str) -> Callable[[], None]:
    """Print the name of the measurement on stderr; the returned function ends the line."""
    print(text, end="", file=sys.stderr, flush=True)
    return lambda: print(file=sys.stderr, flush=True)
