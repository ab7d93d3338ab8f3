"""Jobs per second: empty jobs, enqueued, then drained by a process with eight threads.

python -m benchmarks.drain
python -m benchmarks.drain --brokers redis --variants stock bundle --prefetch 64 --json drain.json
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from typing import Any

from . import rounds
from .measurement import SETTINGS, measure, server_versions
from .peers import PEERS, available, peer_versions
from .rounds import Spread
from .variants import FAILURES, VARIANTS

#: The settings of a scenario, without its variant.
SCENARIO = ("broker", "failures", "prefetch", "log")


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure everything, round by round; print and leave out failures."""
    scenarios = [
        dict(zip(SCENARIO, values, strict=True))
        for values in itertools.product(
            options.brokers, options.failures, options.prefetch or ["default", "64"], options.log
        )
        # RabbitMQ pushes: there the default does not poll.
        if options.prefetch or values[0] == "redis" or values[2] == "default"
    ]
    for number, order in rounds.interleave(options.variants, options.rounds):
        # Rounds outside, scenarios inside: a slow minute of the machine is spread over all of them.
        for scenario in scenarios:
            end_line = rounds.progress(f"round {number + 1}/{options.rounds} {', '.join(scenario.values())}:")
            for variant in order:
                if variant == "sidekiq" and scenario["broker"] != "redis":
                    continue
                if variant in VARIANTS and not VARIANTS[variant].retries and scenario["failures"] != "none":
                    continue
                if measured := measure(**scenario, variant=variant, jobs=options.jobs):
                    yield {"round": number, **scenario, "variant": variant, **measured}
            end_line()


def summarise(measurements: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per scenario and variant: spreads of the rate, of CPU per job, and of their ratios to stock and bundle."""
    by_scenario: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for measurement in measurements:
        by_scenario.setdefault(tuple(measurement[key] for key in SCENARIO), []).append(measurement)
    return [
        {
            **dict(zip(SCENARIO, scenario, strict=True)),
            "variant": variant,
            **{key: Spread(one[key] for one in own) for key in ("rate", "cpu_us", "enqueue_rate")},
            "rate_ratio": rounds.ratios(all_of_it, variant, "rate"),
            "cpu_ratio": rounds.ratios(all_of_it, variant, "cpu_us"),
            "of_bundle": rounds.ratios(all_of_it, variant, "rate", reference="bundle"),
        }
        for scenario, all_of_it in by_scenario.items()
        for variant in (*VARIANTS, *PEERS)
        if (own := [one for one in all_of_it if one["variant"] == variant])
    ]


def table(summary: list[dict[str, Any]]) -> str:
    """The summary as text."""
    header = (*SCENARIO, "variant", "jobs/s", "of stock", "of bundle", "CPU µs/job", "of stock")
    return rounds.format_table(
        header,
        [
            (
                *(entry[key] for key in (*SCENARIO, "variant")),
                f"{entry['rate'].median:,.0f}",
                rounds.format_ratio(entry["rate_ratio"], entry["variant"]),
                rounds.format_ratio(entry["of_bundle"], entry["variant"], reference="bundle"),
                f"{entry['cpu_us'].median:.0f}",
                rounds.format_ratio(entry["cpu_ratio"], entry["variant"]),
            )
            for entry in summary
        ],
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drain", description=__doc__.splitlines()[0])
    parser.add_argument("--long", action="store_true", help="10,000 jobs and 6 rounds instead of 2,000 and 3")
    parser.add_argument("--brokers", nargs="+", choices=("redis", "rabbitmq"), default=["redis", "rabbitmq"])
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=(*VARIANTS, *PEERS),
        help="default: bare, stock, bundle, idempotent, and of celery and sidekiq what is installed",
    )
    parser.add_argument("--failures", nargs="+", choices=tuple(FAILURES), default=list(FAILURES))
    parser.add_argument(
        "--prefetch",
        nargs="+",
        help="values of dramatiq_queue_prefetch, or 'default'; by default that, and 64 on Redis",
    )
    parser.add_argument(
        "--log",
        nargs="+",
        choices=("critical", "info"),
        default=["critical"],
        help="level; 'info' writes the lines to the null device",
    )
    parser.add_argument("--jobs", type=int, help="jobs per measurement")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--json", metavar="PATH", default="build/drain.json", help="where all measurements are written")
    options = parser.parse_args(arguments)
    if options.jobs is None:
        options.jobs = 10_000 if options.long else 2_000
    if options.rounds is None:
        options.rounds = 6 if options.long else 3
    if options.jobs < 2 or options.rounds < 1:
        parser.error("expected at least 2 jobs and 1 round")
    if not all(prefetch == "default" or prefetch.isdigit() for prefetch in options.prefetch or ()):
        parser.error(f"--prefetch: expected numbers or 'default', got {' '.join(options.prefetch)}")
    peers = [peer for peer in PEERS if available(peer)]
    if options.variants is None and peers != list(PEERS):
        print(f"not installed, so not measured: {', '.join(set(PEERS).difference(peers))}", file=sys.stderr)
    options.variants = options.variants or ["bare", "stock", "bundle", "idempotent", *peers]
    return options


def main() -> int:
    """Measure, print, write; exit status 1 if a measurement failed."""
    options = parse()
    machine, servers = rounds.machine(), server_versions(options.brokers)
    measurements = rounds.collect(run(options))
    print(table(summarise(measurements)))
    print(
        f"\n{options.rounds} rounds of {options.jobs:,} jobs, {SETTINGS['threads']} threads; "
        f"median [quartiles] of the ratios. All samples: {options.json}"
    )
    rounds.write_json(
        options.json,
        "drain",
        machine=machine,
        versions=rounds.versions(**servers, **peer_versions(options.variants)),
        settings={"jobs": options.jobs, "rounds": options.rounds, "threads": SETTINGS["threads"]},
        measurements=measurements,
    )
    return 1 if rounds.failures else 0


if __name__ == "__main__":
    sys.exit(main())
