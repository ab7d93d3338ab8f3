"""The lateness of a timeout, and its cost for a job within the limit; beside stock TimeLimit.

    python -m benchmarks.timeout_accuracy

Needs no server. Waiting jobs sleep a millisecond at a time; computing jobs never release the GIL by themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import statistics
import threading
import time
import timeit
from collections.abc import Callable
from time import monotonic
from typing import Any

import dramatiq
from dramatiq.asyncio import EventLoopThread, async_to_sync, set_event_loop_thread
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import TimeLimitExceeded
from dramatiq.middleware.time_limit import TimeLimit

from dramatiq_policies.delivery.limits import timeout_of
from dramatiq_policies.interrupts import runner_for
from dramatiq_policies.interrupts import threads as interrupts
from dramatiq_policies.middleware.timeout import Timeout

Call = Callable[[Callable[[], None], float], None]


def wait() -> None:
    while True:
        time.sleep(0.001)


def compute() -> None:
    while True:
        pass


async def wait_async() -> None:
    while True:  # noqa: ASYNC110 - it waits for its timeout
        await asyncio.sleep(0.001)


JOBS = {"wait": wait, "compute": compute, "async": async_to_sync(wait_async)}


def ours(fn: Callable[[], None], deadline: float) -> None:
    runner_for(fn)(fn, (), {}, deadline=deadline)


class Stock:
    """TimeLimit's own manager, as its hooks use it."""

    def __init__(self) -> None:
        self.manager: Any = TimeLimit().manager
        self.manager.logger = logging.getLogger("quiet")
        self.manager.logger.disabled = True
        self.manager.start()

    def __call__(self, fn: Callable[[], None], deadline: float) -> None:
        self.manager.add_timeout(threading.get_ident(), (deadline - monotonic()) * 1_000)
        try:
            fn()
        finally:
            self.manager.remove_timeout(threading.get_ident())


def lateness(call: Call, fn: Callable[[], None], at_once: int, rounds: int) -> list[float]:
    """Return the lateness of each job's end, in milliseconds."""
    late: list[float] = []

    def work(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(rounds):
            deadline = monotonic() + dice.uniform(0.1, 1.1)
            try:
                call(fn, deadline)
            except TimeLimitExceeded:
                late.append((monotonic() - deadline) * 1_000)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return late


def summary(late: list[float]) -> dict[str, float]:
    late = sorted(late)
    return {
        "jobs": len(late),
        "median": round(statistics.median(late), 2),
        "p95": round(late[int(0.95 * (len(late) - 1))], 2),
        "most": round(late[-1], 2),
    }


def cost() -> dict[str, float]:
    """Nanoseconds per message, above a job that does nothing: from the message's options to the end of the watch."""
    broker = StubBroker(middleware=[])
    actor = dramatiq.actor(lambda: None, broker=broker, actor_name="nothing")
    message: Any = actor.message()
    time_limit: Any = TimeLimit()
    watch = Timeout()

    def nothing() -> None: ...

    def stock() -> None:
        time_limit.before_process_message(broker, message)
        nothing()
        time_limit.after_process_message(broker, message, result=None)

    def ours() -> None:
        limit = timeout_of(message.options, 600_000.0, "nothing")
        deadline = None if limit is None else monotonic() + limit / 1_000
        interrupts.run(nothing, (), {}, deadline=deadline, watch=watch, job=message)

    def best(fn: Callable[[], None]) -> float:
        return min(timeit.repeat(fn, number=50_000, repeat=9)) / 50_000 * 1e9

    bare = best(nothing)
    return {"stock": round(best(stock) - bare), "ours": round(best(ours) - bare)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="jobs per thread (10)")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8, 64], help="threads (1 8 64)")
    parser.add_argument("--json", help="write the figures to this file, too")
    args = parser.parse_args()

    loop = EventLoopThread(logging.getLogger("loop"))
    loop.start()
    set_event_loop_thread(loop)
    stock: Call = Stock()
    figures: dict[str, Any] = {"cost_ns": cost(), "late_ms": {}}
    print(f"arm and disarm, ns per job: {figures['cost_ns']}\n")
    print(f"{'job':8} {'at once':>7} {'':6} {'median':>9} {'p95':>9} {'most':>9}  ms late")
    for kind, fn in JOBS.items():
        for at_once in args.at_once:
            for name, call in (("stock", stock), ("ours", ours)):
                figure = summary(lateness(call, fn, at_once, args.rounds))
                figures["late_ms"][f"{kind} {at_once} {name}"] = figure
                print(f"{kind:8} {at_once:7} {name:6} {figure['median']:9} {figure['p95']:9} {figure['most']:9}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)
    loop.stop()


if __name__ == "__main__":
    main()
