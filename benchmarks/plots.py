"""A plot per question, from the results of the runs.

python -m benchmarks.plots                     # benchmarks/results/*.json to docs/images/
python -m benchmarks.plots build/drain.json --to build
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

from .curves import CURVES
from .rounds import Spread
from .variants import FAILURES

HERE = Path(__file__).parent
ROOT = HERE.parent
COLOURS = {
    "bare": "#b0b0b0",
    "stock": "#6f6f6f",
    "bundle": "#1f77b4",
    "idempotent": "#17a589",
    "celery": "#a4c639",
    "sidekiq": "#c0392b",
}
LABELS = {
    "bare": "Dramatiq without middleware",
    "stock": "plain Dramatiq",
    "bundle": "dramatiq_policies",
    "idempotent": "dramatiq_policies, with keys",
    "celery": "Celery",
    "sidekiq": "Sidekiq with Active Job",
}
NAMES = {"redis": "Redis", "rabbitmq": "RabbitMQ"}


def draw_drain(record: dict[str, Any]) -> Any:
    """Draw bars: a row of panels without failures, and a row with failures."""
    measurements = record["measurements"]
    places = list(dict.fromkeys((one["broker"], one["prefetch"]) for one in measurements))
    kinds = [kind for kind in FAILURES if any(one["failures"] == kind for one in measurements)]
    variants = [name for name in COLOURS if any(one["variant"] == name for one in measurements)]
    figure, axes = plt.subplots(
        len(kinds), len(places), figsize=(3.2 * len(places) + 1.2, 1 + 1.9 * len(kinds)), sharey=True, squeeze=False
    )
    for row, kind in zip(axes, kinds, strict=True):
        for axis, (broker, prefetch) in zip(row, places, strict=True):
            for height, variant in enumerate(reversed(variants)):
                rates = [
                    one["rate"]
                    for one in measurements
                    if (one["broker"], one["prefetch"], one["failures"], one["variant"])
                    == (broker, prefetch, kind, variant)
                ]
                if rates:
                    spread = Spread(rates)
                    error = [[spread.median - spread.low], [spread.high - spread.median]]
                    axis.barh(height, spread.median, xerr=error, color=COLOURS[variant], ecolor="#444444")
            axis.set_yticks(range(len(variants)), [LABELS[variant] for variant in reversed(variants)])
            failures = "no failures" if kind == "none" else "10 % transient, 5 % permanent"
            if kind == kinds[-1]:
                axis.set_xlabel("jobs/s")
            axis.set_title(f"{NAMES[broker]}, prefetch {prefetch}\n{failures}", fontsize=9)
    return figure


def draw_memory(record: dict[str, Any]) -> Any:
    """Resident memory over the jobs that were run."""
    figure, axis = plt.subplots(figsize=(5.5, 3.2))
    for one in record["measurements"]:
        jobs, mebibytes = zip(*one["memory"], strict=True)
        first = one["round"] == min(other["round"] for other in record["measurements"])
        axis.plot(jobs, mebibytes, color=COLOURS[one["variant"]], label=LABELS[one["variant"]] if first else None)
    axis.set(xlabel="jobs run", ylabel="resident memory, MiB", title=CURVES["memory"].question)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    return figure


def draw_curve(record: dict[str, Any]) -> Any:
    """Draw a panel per broker: medians, and quartiles as a band; for keys another panel with the bytes of a key."""
    curve = CURVES[record["benchmark"]]
    key, label = ("enqueue_rate", "messages sent/s") if record["benchmark"] == "confirms" else ("rate", "jobs/s")
    measurements = record["measurements"]
    grown = [one for one in measurements if "used_bytes" in one]
    panels = len(curve.brokers) + bool(grown)
    figure, axes = plt.subplots(1, panels, figsize=(4.2 * panels + 0.8, 3.3), squeeze=False)
    for axis, broker in zip(axes[0], curve.brokers, strict=False):
        own = [one for one in measurements if one.get("broker") == broker]
        points = list(dict.fromkeys(one["point"] for one in own))
        for variant in curve.variants:
            spreads = [
                Spread(one[key] for one in own if (one["point"], one["variant"]) == (point, variant))
                for point in points
            ]
            axis.plot(
                points, [spread.median for spread in spreads], "o-", color=COLOURS[variant], label=LABELS[variant]
            )
            axis.fill_between(
                points,
                [spread.low for spread in spreads],
                [spread.high for spread in spreads],
                color=COLOURS[variant],
                alpha=0.15,
            )
        _scale(axis, points)
        axis.set(xlabel=curve.axis, ylabel=label, title=NAMES[broker])
        axis.set_ylim(bottom=0)
    axes[0][0].legend(fontsize=8)
    if grown:
        total = 0
        heights = []
        for one in grown:
            total += one["used_bytes"]
            heights.append(total / one["point"])
        axis = axes[0][-1]
        axis.plot([one["point"] for one in grown], heights, "o-", color=COLOURS["idempotent"])
        _scale(axis, [one["point"] for one in grown])
        axis.set(xlabel=curve.axis, ylabel="bytes of Redis' memory per key", title="Redis")
        axis.set_ylim(bottom=0)
    figure.suptitle(curve.question, fontsize=11)
    return figure


def _scale(axis: Any, points: list[Any]) -> None:
    if isinstance(points[0], str):
        return
    if points[-1] > 8 * points[0]:
        axis.set_xscale("log")
    axis.set_xticks(points, [_short(point) for point in points], minor=False)
    axis.minorticks_off()


def _short(number: int) -> str:
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if number >= size:
            return f"{number // size}{unit}"
    return str(number)


def caption(record: dict[str, Any]) -> str:
    """Machine, versions and date."""
    machine, versions, settings = record["machine"], record["versions"], record["settings"]
    names = ("python", "dramatiq", "redis_server", "rabbitmq_server", "hiredis", "celery", "sidekiq", "ruby")
    found = ", ".join(
        f"{NAMES.get(name.removesuffix('_server'), name.capitalize())} {versions[name].removeprefix('CPython ')}"
        for name in names
        if versions.get(name)
    )
    jobs = f" of {settings['jobs']:,} jobs" if "jobs" in settings else ""
    return (
        f"{machine['cpu']}, {machine['cpus']} CPUs shared by worker and servers, load {machine['load_average_1m']} at the "
        f"start. {found}. Jobs that do nothing; {settings['rounds']} rounds{jobs}, medians and quartiles. "
        f"{record['date'][:10]}, commit {versions['commit']}."
    )


def draw(path: Path, folder: Path) -> Path:
    """One JSON to ``bench-NAME.svg`` in the folder."""
    record = json.loads(path.read_text(encoding="utf-8"))
    name = record["benchmark"]
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}):  # fmt: skip
        figure = {"drain": draw_drain, "memory": draw_memory}.get(name, draw_curve)(record)
        width, height = figure.get_size_inches()
        text = textwrap.wrap(caption(record), int(width * 20), break_on_hyphens=False)
        figure.set_size_inches(width, height + 0.16 * len(text))
        below = 0.16 * len(text) / (height + 0.16 * len(text)) + 0.02
        figure.tight_layout(rect=(0, below, 1, 1))
        figure.text(0.01, 0.01, "\n".join(text), fontsize=7, color="#555555")
        target = folder / f"bench-{name}.svg"
        figure.savefig(target, metadata={"Date": None})
        plt.close(figure)
    return target


def main() -> None:
    """Draw all that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__.splitlines()[0])
    parser.add_argument("json", nargs="*", type=Path, default=sorted((HERE / "results").glob("*.json")))
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args()
    for path in options.json:
        print(draw(path, options.to))


if __name__ == "__main__":
    main()
