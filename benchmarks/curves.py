"""How the rate, and memory, change with one thing at a time.

python -m benchmarks.curves threads payload
python -m benchmarks.curves keys --rounds 5 --json-dir build
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import rounds
from .measurement import measure, queue_of_its_own, server_versions
from .rounds import Spread

#: Enough messages to spare a worker on Redis the wait for its next poll.
AHEAD: dict[str, Any] = {"prefetch": 64}


@dataclass(frozen=True)
class Curve:
    """One question.

    Attributes:
      question: The title of the plot.
      axis: The name of the changed quantity.
      points: Its values; in ascending order for a curve with ``stands_on``.
      settings: The settings of a measurement, by the point.
      stands_on: A task of ``measurement`` to prepare the number of the point, kept for later points.
    """

    question: str
    axis: str
    points: tuple[Any, ...]
    settings: Callable[[Any], dict[str, Any]]
    brokers: tuple[str, ...] = ("redis", "rabbitmq")
    variants: tuple[str, ...] = ("stock", "bundle", "idempotent")
    stands_on: str | None = None
    always: dict[str, Any] = field(default_factory=lambda: dict(AHEAD))


CURVES = {
    "threads": Curve(
        "Threads in one process",
        "threads (prefetch 128)",
        (1, 2, 4, 8, 16, 32, 64),
        lambda threads: {"threads": threads},
        always={"prefetch": 128},
    ),
    "processes": Curve(
        "Processes of 8 threads",
        "processes (prefetch 64)",
        (1, 2, 3, 4),
        lambda processes: {"task": "processes", "processes": processes, "jobs": 4_000},
    ),
    "prefetch": Curve(
        "Prefetched messages, 8 threads",
        "dramatiq_queue_prefetch (default: 16)",
        (8, 16, 32, 64, 128, 256),
        lambda prefetch: {"prefetch": prefetch},
    ),
    "queue": Curve(
        "Length of the queue",
        "messages in the queue",
        (1_000, 10_000, 100_000, 1_000_000),
        lambda length: {"jobs": min(length, 2_000), "backlog": True},
        variants=("stock", "bundle"),
        stands_on="fill",
    ),
    "payload": Curve(
        "Size of a job's argument",
        "bytes",
        (100, 1_000, 10_000, 100_000, 1_000_000),
        lambda size: {"payload": size, "jobs": min(2_000, max(200, 100_000_000 // size))},
        variants=("stock", "bundle"),
    ),
    "keys": Curve(
        "Completed idempotency keys in the store",
        "keys",
        (10_000, 100_000, 1_000_000),
        lambda keys: {},
        brokers=("redis",),
        stands_on="keys",
    ),
    "memory": Curve(
        "Memory of a worker",
        "jobs",
        (200_000,),
        lambda jobs: {"jobs": jobs, "memory_every": jobs // 40, "by_thousands": True},
        brokers=("redis",),
    ),
    "lease": Curve(
        "Renewing leases every third of them",
        "lease in ms (default: 60,000)",
        (300, 3_000, 60_000),
        lambda lease: {"lease": lease},
        variants=("bundle", "idempotent"),
    ),
    "hiredis": Curve(
        "With hiredis, and without", "hiredis", ("no", "yes"), lambda yes: {"hiredis": yes == "yes"}, brokers=("redis",)
    ),
    "confirms": Curve(
        "Publisher confirms: messages sent",
        "confirm_delivery",
        ("no", "yes"),
        lambda yes: {"confirms": yes == "yes"},
        brokers=("rabbitmq",),
        variants=("stock", "bundle"),
    ),
}


def run(curve: Curve, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure in rounds: at each point all variants in turn."""
    points = [type(curve.points[0])(point) for point in options.points or curve.points]
    if curve.stands_on:  # is built up once
        turns = [(point, number) for point in points for number in range(options.rounds)]
    else:
        turns = [(point, number) for number in range(options.rounds) for point in points]
    for broker in curve.brokers:
        with queue_of_its_own(broker) if curve.stands_on else nullcontext() as name:
            standing = 0
            for point, number in turns:
                settings = {**curve.always, "broker": broker, **curve.settings(point)}
                if options.jobs:
                    settings["jobs"] = options.jobs
                if curve.stands_on == "fill":
                    settings["name"] = name
                end_line = rounds.progress(f"{broker} {curve.axis} {point}, round {number + 1}:")
                if curve.stands_on and point > standing:
                    there = measure(task=curve.stands_on, broker=broker, name=name, jobs=point, standing=standing)
                    standing = point
                    if there:
                        yield {"point": point, **there}
                turn = number % len(curve.variants)
                for variant in (*curve.variants[turn:], *curve.variants[:turn]):
                    if measured := measure(**settings, variant=variant):
                        yield {"round": number, "broker": broker, "point": point, "variant": variant, **measured}
                end_line()


def table(curve: Curve, measurements: list[dict[str, Any]]) -> str:
    """Medians and ratios as text."""
    rows = []
    at: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for measurement in measurements:
        if "rate" in measurement:
            at.setdefault((measurement["broker"], measurement["point"]), []).append(measurement)
    for (broker, point), there in at.items():
        for variant in curve.variants:
            if rates := [one["rate"] for one in there if one["variant"] == variant]:
                of_stock = rounds.format_ratio(rounds.ratios(there, variant, "rate"), variant)
                of_bundle = rounds.format_ratio(
                    rounds.ratios(there, variant, "rate", reference="bundle"), variant, reference="bundle"
                )
                rows.append((broker, str(point), variant, f"{Spread(rates).median:,.0f}", of_stock, of_bundle))
    return rounds.format_table(("broker", curve.axis, "variant", "jobs/s", "of stock", "of bundle"), rows)


def main() -> int:
    """Measure, and write a JSON for each curve."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__.splitlines()[0])
    parser.add_argument("curves", nargs="*", metavar="CURVE", help=f"of {', '.join(CURVES)}; default: all")
    parser.add_argument("--points", nargs="+", help="other points")
    parser.add_argument("--jobs", type=int, help="jobs per measurement (2,000 for most)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json-dir", default="build", type=Path, help="where each is written as NAME.json")
    options = parser.parse_args()
    if unknown := set(options.curves).difference(CURVES):
        parser.error(f"expected some of {', '.join(CURVES)}, got {', '.join(sorted(unknown))}")
    for name in options.curves or CURVES:
        curve = CURVES[name]
        servers = server_versions(sorted({*curve.brokers, "redis"}))
        machine = rounds.machine()
        measurements = rounds.collect(run(curve, options))
        print(table(curve, measurements))
        rounds.write_json(
            options.json_dir / f"{name}.json",
            name,
            machine=machine,
            versions=rounds.versions(**servers),
            settings={"rounds": options.rounds},
            measurements=measurements,
        )
    return 1 if rounds.failures else 0


if __name__ == "__main__":
    sys.exit(main())
