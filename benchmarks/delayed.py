"""Delayed messages: the delay of near messages behind 50,000 far messages, and the rate of moving due messages.

``behind``: FAR messages in the delay queue are due in an hour. A worker of eight threads starts. Then 20 messages
with a delay of 200 ms are sent, two a second. How late each ran, the worker's CPU and its memory.

``due``: DUE messages come due at the same moment. The rate at which they run; and once more with the worker killed in the
middle: how many ran twice.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dramatiq

from .measurement import queue_of_its_own
from .variants import RABBITMQ_URL, REDIS_URL

HOUR = 3_600_000
#: Seconds until a message without a run counts as lost.
PATIENCE = 60.0


def broker_of(kind: str, variant: str, name: str) -> Any:
    broker: Any
    if kind == "redis":
        from dramatiq.brokers.redis import RedisBroker

        broker = RedisBroker(url=REDIS_URL, namespace=name)
    else:
        from dramatiq.brokers.rabbitmq import RabbitmqBroker

        broker = RabbitmqBroker(url=RABBITMQ_URL)
    if variant == "bundle":
        from dramatiq_policies import install

        install(broker, idempotency=False)
    broker.declare_queue(name)
    return broker


def work(kind: str, variant: str, name: str, path: str) -> None:
    """The worker process: notes each run, and its own CPU and memory twice a second."""
    broker = broker_of(kind, variant, name)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    @dramatiq.actor(broker=broker, queue_name=name)
    def job(number: int) -> None:
        os.write(file, f"{number} {time.time()}\n".encode())

    worker = dramatiq.Worker(broker, worker_threads=8)
    worker.start()
    while True:
        time.sleep(0.5)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        usage = resource.getrusage(resource.RUSAGE_SELF)
        kib = pages * resource.getpagesize() // 1024
        Path(f"{path}.new").write_text(f"{usage.ru_utime + usage.ru_stime} {kib}")
        Path(f"{path}.new").replace(f"{path}.usage")


@contextmanager
def worker(*args: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "benchmarks.delayed", "--work", *args]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def runs(path: str) -> list[tuple[int, float]]:
    if not Path(path).exists():
        return []
    # The last line may still be incomplete.
    lines = [line.split() for line in Path(path).read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [(int(number), float(at)) for number, at in lines]


def usage(path: str) -> tuple[float, int]:
    cpu, kib = Path(f"{path}.usage").read_text().split()
    return float(cpu), int(kib)


def until(condition: Callable[[], Any], seconds: float = PATIENCE) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def send(broker: Any, name: str, numbers: range, delay: int) -> None:
    for number in numbers:
        broker.enqueue(dramatiq.Message(name, "job", (number,), {}, {}), delay=delay)


def behind(kind: str, variant: str, far: int) -> str:
    with queue_of_its_own(kind) as name, tempfile.TemporaryDirectory() as folder:
        broker, path = broker_of(kind, variant, name), f"{folder}/runs"
        send(broker, name, range(far), HOUR)
        with worker(kind, variant, name, path):
            time.sleep(20)
            cpu, memory = usage(path)
            due: dict[int, float] = {}
            for number in range(far, far + 20):
                due[number] = time.time() + 0.2
                send(broker, name, range(number, number + 1), 200)
                time.sleep(0.5)
            until(lambda: len(runs(path)) == 20)
            late = sorted(at - due[number] for number, at in runs(path))
            spent, memory_after = usage(path)
        broker.close()
    shown = f"median {statistics.median(late):.2f} s late, at most {late[-1]:.2f} s" if late else "none"
    return (
        f"{len(late)} of 20 ran, {shown}; CPU {cpu:.1f} s in the first 20 s, {spent - cpu:.1f} s while the near ones ran; "
        f"memory {memory // 1024} MiB, then {memory_after // 1024}"
    )


def due(kind: str, variant: str, count: int, *, killed: bool) -> str:
    with queue_of_its_own(kind) as name, tempfile.TemporaryDirectory() as folder:
        broker, path = broker_of(kind, variant, name), f"{folder}/runs"
        send(broker, name, range(count), 20_000)
        with worker(kind, variant, name, path) as process:
            until(lambda: len(runs(path)) >= count // 4 if killed else len({n for n, _ in runs(path)}) == count, 300)
            if killed:
                process.send_signal(signal.SIGKILL)
                process.wait()
        if killed:
            with worker(kind, variant, name, path):
                until(lambda: len({n for n, _ in runs(path)}) == count, 300)
                time.sleep(2)
        seen = runs(path)
        broker.close()
    times = Counter(number for number, _ in seen)
    if killed:
        twice = sum(1 for number in times if times[number] > 1)
        return f"killed after a quarter: {len(times)} of {count} ran, {twice} of them twice"
    ats = sorted(at for _, at in seen)
    return f"{len(times)} of {count} ran, {count / (ats[-1] - ats[0]):,.0f} a second, {len(seen) - len(times)} twice"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--brokers", nargs="+", default=["redis", "rabbitmq"])
    parser.add_argument("--variants", nargs="+", default=["stock", "bundle"])
    parser.add_argument("--far", type=int, default=50_000)
    parser.add_argument("--due", type=int, default=4_000)
    parser.add_argument("--only", choices=["behind", "due"])
    options = parser.parse_args()
    if options.work:
        work(*options.work)
    for kind in options.brokers:
        for variant in options.variants:
            if options.only != "due":
                print(f"{kind}, {variant}, behind: {behind(kind, variant, options.far)}", flush=True)
            if options.only != "behind":
                print(f"{kind}, {variant}, due: {due(kind, variant, options.due, killed=False)}", flush=True)
                if kind == "rabbitmq":
                    print(f"{kind}, {variant}, due: {due(kind, variant, options.due, killed=True)}", flush=True)


if __name__ == "__main__":
    main()
