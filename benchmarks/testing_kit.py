"""How many jobs that do nothing a second run in ``drain``, and under a real worker until ``broker.join``.

The ways take turns, so that each meets the machine in the same state. Of each the best round is shown: what else the machine
did meanwhile is in the others.
"""

from __future__ import annotations

import argparse
import gc
import time
from functools import partial

import dramatiq
from dramatiq.brokers.stub import StubBroker

from dramatiq_policies import install
from dramatiq_policies.testing import drain


def stage(jobs: int) -> StubBroker:
    broker = install(StubBroker())

    @dramatiq.actor(broker=broker)
    def nothing(number: int) -> None: ...

    for number in range(jobs):
        nothing.send(number)
    return broker


def by_drain(broker: StubBroker) -> None:
    drain(broker)


def by_worker(broker: StubBroker, threads: int) -> None:
    worker = dramatiq.Worker(broker, worker_timeout=100, worker_threads=threads)
    worker.start()
    broker.join("default")
    worker.stop()


WAYS = {
    "drain": by_drain,
    "1 thread": partial(by_worker, threads=1),
    "8 threads": partial(by_worker, threads=8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    for jobs in (1, 100, 5_000):
        wall: dict[str, list[float]] = {name: [] for name in WAYS}
        cpu: dict[str, list[float]] = {name: [] for name in WAYS}
        for _ in range(rounds):
            for name, run in WAYS.items():
                broker = stage(jobs)
                gc.collect()
                started, used = time.perf_counter(), time.process_time()
                run(broker)
                wall[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - used)
        for name in WAYS:
            took, used = min(wall[name]), min(cpu[name])
            print(
                f"{jobs:5} jobs  {name:>9}: {took * 1_000:8.1f} ms, {jobs / took:8.0f} a second, "
                f"{used / jobs * 1e6:8.0f} µs of CPU each"
            )


if __name__ == "__main__":
    main()
