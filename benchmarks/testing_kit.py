"""How many jobs that do nothing a second run in ``drain``, and under a real worker until ``broker.join``."""

from __future__ import annotations

import argparse
import time

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


def by_worker(broker: StubBroker) -> None:
    worker = dramatiq.Worker(broker, worker_timeout=100)
    worker.start()
    broker.join("default")
    worker.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    for jobs in (1, 5_000):
        for name, run in (("drain", by_drain), ("worker", by_worker)):
            best = float("inf")
            for _ in range(rounds):
                broker = stage(jobs)
                started = time.perf_counter()
                run(broker)
                best = min(best, time.perf_counter() - started)
            print(f"{name:>6}: {jobs:5} jobs in {best * 1_000:8.1f} ms, {jobs / best:8.0f} a second")


if __name__ == "__main__":
    main()
