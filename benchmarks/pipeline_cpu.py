"""CPU per message of middleware, consumer and acknowledgement: one thread, no broker I/O.

    python -m benchmarks.pipeline_cpu

A single thread takes messages with ``next`` from the consumer of ``broker.consume``, runs each with Dramatiq's
``WorkerThread.process_message`` and acknowledges with ``ConsumerThread.post_process_message``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from typing import Any

from dramatiq import Worker
from dramatiq.brokers.stub import StubBroker
from dramatiq.worker import ConsumerThread, WorkerThread

from . import rounds
from .rounds import MeasurementFailed, Spread
from .variants import FAILURES, VARIANTS, Workload

QUEUE = "bench"
BATCH = 50
WARM_UP = 40 * BATCH
TIMEOUT = 300.0

#: The reported steps: take a message (with the decoding), run and acknowledge the message, and both together.
PARTS = ("take_us", "process_us", "total_us")


def measure_cpu(settings: dict[str, Any]) -> None:
    """Print the CPU per message of a variant, in µs, as JSON."""
    logging.basicConfig(level=logging.CRITICAL)
    messages = settings["messages"]
    workload = Workload(messages + WARM_UP, settings["failures"])
    variant = VARIANTS[settings["variant"]]
    broker = variant.broker(StubBroker)
    send = workload.declare(variant, broker, QUEUE)
    for number in range(messages + WARM_UP):
        send(number)

    # The threads of a Worker, with the hooks of their starts, but not started: this thread does their work.
    worker = Worker(broker, worker_threads=1)
    broker.emit_after("process_boot")
    broker.emit_before("worker_boot", worker)
    consumer_thread = ConsumerThread(
        broker=broker,
        queue_name=QUEUE,
        prefetch=messages + WARM_UP,
        work_queue=worker.work_queue,
        worker_timeout=1_000,
    )
    worker.consumers[QUEUE] = consumer_thread
    worker_thread = WorkerThread(
        broker=broker, consumers=worker.consumers, work_queue=worker.work_queue, worker_timeout=1_000
    )
    broker.emit_after("consumer_thread_boot", consumer_thread)
    broker.emit_after("worker_thread_boot", worker_thread)
    broker.emit_after("worker_boot", worker)
    consumer_thread.consumer = broker.consume(QUEUE, prefetch=messages + WARM_UP, timeout=1_000)

    _run(WARM_UP, consumer_thread, worker_thread)
    take, process = _run(messages, consumer_thread, worker_thread)
    result = {
        "take_us": take / messages * 1e6,
        "process_us": process / messages * 1e6,
        "total_us": (take + process) / messages * 1e6,
    }
    print(json.dumps(result), flush=True)
    os._exit(0)


def _run(messages: int, consumer_thread: ConsumerThread, worker_thread: WorkerThread) -> tuple[float, float]:
    consumer = consumer_thread.consumer
    assert consumer is not None
    work_queue = worker_thread.work_queue
    clock = time.process_time
    take = process = 0.0
    for _ in range(messages // BATCH):
        started = clock()
        taken = [next(consumer) for _ in range(BATCH)]
        take += clock() - started
        # The way over the work queue is the same for everyone and would only hide the difference.
        for one in taken:
            if one is None:
                sys.exit("the consumer had no message")
            consumer_thread.handle_message(one)
        batch = [work_queue.get().message for _ in range(BATCH)]
        started = clock()
        for message in batch:
            worker_thread.process_message(message)
        process += clock() - started
    return take, process


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline_cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer messages and rounds: seconds")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=["bare", "stock", "bundle", "full"])
    parser.add_argument("--failures", nargs="+", choices=tuple(FAILURES), default=list(FAILURES))
    parser.add_argument("--messages", type=int, help=f"messages per measurement, a multiple of {BATCH} (20,000)")
    parser.add_argument("--rounds", type=int, help="rounds (9)")
    parser.add_argument("--json", metavar="PATH", help="write all measurements to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.messages is None:
        options.messages = 5_000 if options.short else 20_000
    if options.rounds is None:
        options.rounds = 3 if options.short else 9
    if options.messages < BATCH or options.messages % BATCH or options.rounds < 1:
        parser.error(f"expected at least 1 round and a multiple of {BATCH} messages")
    return options


def main() -> int:
    """Measure, print, write; exit status 1 if a measurement failed."""
    options = parse()
    if options.measure is not None:
        measure_cpu(json.loads(options.measure))
    machine = rounds.machine()
    measurements: list[dict[str, Any]] = []
    failed = 0
    for number, order in rounds.interleave(options.variants, options.rounds):
        end_line = rounds.progress(f"round {number + 1}/{options.rounds}:")
        for failures in options.failures:
            for variant in order:
                settings = {"variant": variant, "failures": failures, "messages": options.messages}
                try:
                    measured = rounds.measure("benchmarks.pipeline_cpu", settings, env={}, timeout=TIMEOUT)
                except MeasurementFailed as error:
                    failed += 1
                    print(f"\n{error}", file=sys.stderr)
                    continue
                print(f" {variant} {measured['total_us']:.1f} µs", end="", file=sys.stderr, flush=True)
                measurements.append({"round": number, "variant": variant, "failures": failures, **measured})
        end_line()

    summary: list[dict[str, Any]] = []
    rows = []
    for failures in options.failures:
        of_these = [one for one in measurements if one["failures"] == failures]
        for variant in options.variants:
            own = [one for one in of_these if one["variant"] == variant]
            if not own:
                continue
            spreads = {part: Spread(one[part] for one in own) for part in PARTS}
            against = {part: rounds.ratios(of_these, variant, part) for part in PARTS}
            row = [failures, variant]
            for part in PARTS:
                row += [f"{spreads[part].median:.1f}", rounds.format_ratio(against[part], variant)]
            rows.append(row)
            summary.append(
                {
                    "failures": failures,
                    "variant": variant,
                    **{part: spread.as_dict() for part, spread in spreads.items()},
                    **{f"{part}_ratio": ratio.as_dict() for part, ratio in against.items() if ratio},
                }
            )
    header = ("failures", "variant", "take µs", "of stock", "process µs", "of stock", "total µs", "of stock")
    print(rounds.format_table(header, rows))
    print(f"\n{options.rounds} rounds of {options.messages:,} messages; median [quartiles] of the ratios")
    if options.json:
        rounds.write_json(
            options.json,
            "pipeline_cpu",
            machine=machine,
            versions=rounds.versions(),
            settings={"messages": options.messages, "rounds": options.rounds},
            summary=summary,
            measurements=measurements,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
