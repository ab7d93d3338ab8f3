"""Jobs per second: jobs that do nothing, enqueued, then drained by one process with eight threads.

    python -m benchmarks.drain --short
    python -m benchmarks.drain --brokers redis --variants stock bundle --prefetch 64 --json drain.json

The clock runs from the start of the first job to the end of the last one that is final, in the process that drains.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import dramatiq

from . import rounds
from .peers import PEERS
from .rounds import MeasurementFailed, Spread
from .variants import FAILURES, VARIANTS, Workload, choose

THREADS = 8
TIMEOUT = 300.0  # seconds for one measurement

REDIS_URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")
RABBITMQ_URL = os.environ.get("RABBITMQ_URL", "amqp://guest:guest@127.0.0.1:5672")


# ---------------------------------------------------------------------- one measurement, in a process of its own


def drain(settings: dict[str, Any]) -> None:
    """Enqueue, drain, print what was measured, and leave without ceremony."""
    _set_up_logging(settings["log"])
    marks: list[tuple[float, float]] = []
    over = threading.Event()

    def on_last() -> None:
        marks.append((time.perf_counter(), time.process_time()))
        over.set()

    jobs = settings["jobs"]
    workload = Workload(
        jobs,
        settings["failures"],
        on_first=lambda: marks.append((time.perf_counter(), time.process_time())),
        on_last=on_last,
    )
    variant = VARIANTS[settings["variant"]]
    broker = variant.broker(_broker_factory(settings["broker"], settings["name"]))
    send = workload.declare(variant, broker, settings["name"])
    enqueue_from = time.perf_counter()
    for number in range(jobs):
        send(number)
    enqueued = time.perf_counter()

    broker.emit_after("process_boot")  # as the command line does
    dramatiq.Worker(broker, worker_threads=THREADS).start()
    if not over.wait(TIMEOUT - 30):
        sys.exit("the jobs did not end")
    if workload.runs != workload.expected_runs:
        sys.exit(f"expected {workload.expected_runs} runs, got {workload.runs}")
    (first, first_cpu), (last, last_cpu) = marks
    print(
        json.dumps(
            {
                "rate": jobs / (last - first),
                "cpu_us": (last_cpu - first_cpu) / jobs * 1e6,
                "enqueue_rate": jobs / (enqueued - enqueue_from),
                "runs": workload.runs,
            }
        ),
        flush=True,
    )
    os._exit(0)


def _broker_factory(broker: str, name: str) -> Callable[..., dramatiq.Broker]:
    if broker == "redis":
        from dramatiq.brokers.redis import RedisBroker

        untyped: Any = RedisBroker
        return lambda **options: untyped(url=REDIS_URL, namespace=name, **options)

    from dramatiq.brokers.rabbitmq import RabbitmqBroker

    return lambda **options: RabbitmqBroker(url=RABBITMQ_URL, **options)


def _set_up_logging(log: str) -> None:
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    if log == "critical":
        logging.basicConfig(level=logging.CRITICAL)
        return
    from dramatiq.cli import LOGFORMAT

    sink = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    logging.basicConfig(level=logging.INFO, format=LOGFORMAT, stream=sink)


# ---------------------------------------------------------------------- the servers


@contextmanager
def queue_of_its_own(broker: str) -> Iterator[str]:
    """A name that nobody else uses; what was made under it is deleted at the end, and nothing else."""
    name = f"bench-{uuid.uuid4().hex[:12]}"
    try:
        yield name
    finally:
        if broker == "redis":
            _delete_redis(name)
        else:
            _delete_rabbitmq(name)


def _delete_redis(name: str) -> None:
    import redis

    with redis.Redis.from_url(REDIS_URL) as client:
        keys = client.scan_iter(match=f"{name}:*", count=1_000)
        for batch in iter(lambda: list(itertools.islice(keys, 500)), []):
            client.unlink(*batch)


def _delete_rabbitmq(name: str) -> None:
    import pika

    with pika.BlockingConnection(pika.URLParameters(RABBITMQ_URL)) as connection:
        channel = connection.channel()
        for queue_name in (name, f"{name}.DQ", f"{name}.XQ"):
            channel.queue_delete(queue_name)


def server_versions(brokers: list[str]) -> dict[str, str | None]:
    """Ask each server; also the first to find one that does not answer."""
    found: dict[str, str | None] = {}
    if "redis" in brokers:
        import redis

        with redis.Redis.from_url(REDIS_URL) as client:
            found["redis_server"] = client.info("server")["redis_version"]
    if "rabbitmq" in brokers:
        import pika

        with pika.BlockingConnection(pika.URLParameters(RABBITMQ_URL)) as connection:
            properties = getattr(getattr(connection, "_impl", None), "server_properties", None) or {}
            server = properties.get("version")
            found["rabbitmq_server"] = server.decode() if isinstance(server, bytes) else server
    return found


# ---------------------------------------------------------------------- all of them


def run(options: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """Measure everything, round by round; returns the measurements and how many failed."""
    scenarios = list(itertools.product(options.brokers, options.failures, options.prefetch, options.log))
    measurements: list[dict[str, Any]] = []
    failed = 0
    for number, order in rounds.interleave(options.variants, options.rounds):
        # Rounds outside, scenarios inside: a slow minute of the machine is spread over all of them.
        for broker, failures, prefetch, log in scenarios:
            end_line = rounds.progress(
                f"round {number + 1}/{options.rounds} {broker}, failures {failures}, prefetch {prefetch}, log {log}:"
            )
            for variant in order:
                if variant in PEERS:
                    if broker != "redis":
                        continue
                elif not (VARIANTS[variant].retries or failures == "none"):
                    continue
                scenario = {
                    "broker": broker,
                    "failures": failures,
                    "prefetch": prefetch,
                    "log": log,
                    "variant": variant,
                }
                try:
                    with queue_of_its_own(broker) as name:
                        measured = rounds.measure(
                            "benchmarks.peers" if variant in PEERS else "benchmarks.drain",
                            {**scenario, "name": name, "jobs": options.jobs},
                            env={"dramatiq_queue_prefetch": None if prefetch == "default" else prefetch},
                            timeout=TIMEOUT,
                        )
                except MeasurementFailed as error:
                    failed += 1
                    print(f"\n{error}", file=sys.stderr)
                    continue
                print(f" {variant} {measured['rate']:,.0f}/s", end="", file=sys.stderr, flush=True)
                measurements.append({"round": number, **scenario, **measured})
            end_line()
    return measurements, failed


def summarise(measurements: list[dict[str, Any]], variants: list[str]) -> list[dict[str, Any]]:
    """One entry per scenario and variant: spreads of the rate, of CPU per job, and of their ratios to stock."""
    by_scenario: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for measurement in measurements:
        scenario = tuple(measurement[key] for key in ("broker", "failures", "prefetch", "log"))
        by_scenario.setdefault(scenario, []).append(measurement)
    return [
        {
            **dict(zip(("broker", "failures", "prefetch", "log"), scenario, strict=True)),
            "variant": variant,
            "rate": Spread(one["rate"] for one in own),
            "cpu_us": Spread(one["cpu_us"] for one in own),
            "enqueue_rate": Spread(one["enqueue_rate"] for one in own),
            "rate_ratio": rounds.ratios(all_of_it, variant, "rate"),
            "cpu_ratio": rounds.ratios(all_of_it, variant, "cpu_us"),
        }
        for scenario, all_of_it in by_scenario.items()
        for variant in variants
        if (own := [one for one in all_of_it if one["variant"] == variant])
    ]


def table(summary: list[dict[str, Any]]) -> str:
    """The summary as text."""
    header = ("broker", "failures", "prefetch", "log", "variant", "jobs/s", "of stock", "CPU µs/job", "of stock")
    return rounds.format_table(
        header,
        [
            (
                *(entry[key] for key in ("broker", "failures", "prefetch", "log", "variant")),
                f"{entry['rate'].median:,.0f}",
                rounds.format_ratio(entry["rate_ratio"], entry["variant"]),
                f"{entry['cpu_us'].median:.0f}",
                rounds.format_ratio(entry["cpu_ratio"], entry["variant"]),
            )
            for entry in summary
        ],
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drain", description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer jobs and rounds, no bare variant: two minutes")
    parser.add_argument("--brokers", nargs="+", choices=("redis", "rabbitmq"), default=["redis", "rabbitmq"])
    parser.add_argument("--variants", nargs="+", choices=(*VARIANTS, *PEERS), help="default: all but control")
    parser.add_argument("--failures", nargs="+", choices=tuple(FAILURES), default=list(FAILURES))
    parser.add_argument(
        "--prefetch", nargs="+", default=["default", "64"], help="values of dramatiq_queue_prefetch, or 'default'"
    )
    parser.add_argument(
        "--log",
        nargs="+",
        choices=("critical", "info"),
        default=["critical"],
        help="level; 'info' writes the lines to the null device",
    )
    parser.add_argument("--jobs", type=int, help="jobs per measurement (10,000)")
    parser.add_argument("--rounds", type=int, help="rounds (6)")
    parser.add_argument("--json", metavar="PATH", help="write all measurements to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.jobs is None:
        options.jobs = 2_000 if options.short else 10_000
    if options.rounds is None:
        options.rounds = 4 if options.short else 6
    if options.jobs < 2 or options.rounds < 1:
        parser.error("expected at least 2 jobs and 1 round")
    if not all(prefetch == "default" or prefetch.isdigit() for prefetch in options.prefetch):
        parser.error(f"--prefetch: expected numbers or 'default', got {' '.join(options.prefetch)}")
    if options.measure is None:
        options.variants = choose(parser, options.variants, ("bare", "control") if options.short else ("control",))
    return options


def main() -> int:
    """Measure, print, write; exit status 1 if a measurement failed."""
    options = parse()
    if options.measure is not None:
        drain(json.loads(options.measure))
    servers = server_versions(options.brokers)
    machine = rounds.machine()
    measurements, failed = run(options)
    summary = summarise(measurements, options.variants)
    print(table(summary))
    print(f"\n{options.rounds} rounds of {options.jobs:,} jobs, {THREADS} threads; median [quartiles] of the ratios")
    if options.json:
        rounds.write_json(
            options.json,
            "drain",
            machine=machine,
            versions=rounds.versions(**servers),
            settings={"jobs": options.jobs, "rounds": options.rounds, "threads": THREADS},
            summary=[
                {key: value.as_dict() if isinstance(value, Spread) else value for key, value in entry.items()}
                for entry in summary
            ],
            measurements=measurements,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
