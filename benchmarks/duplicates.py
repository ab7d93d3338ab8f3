"""Many duplicates of a running job: the number of deferrals, their CPU cost, and the delay of other jobs.

    python -m benchmarks.duplicates [--duplicates 10000] [--seconds 60]

Starts a private Redis server, one worker process of eight threads, and one long job. Then sends duplicates of the job
and, ten times a second, a job of another key to the same queue.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import dramatiq
import redis
from dramatiq.brokers.redis import RedisBroker

from dramatiq_policies import ErrorClassifier, OutcomeEvent, install


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--duplicates", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        work(asked.worker)
    else:
        print(json.dumps(measure(asked.duplicates, asked.seconds), indent=2))


def app(port: int, **options: Any) -> tuple[Any, Any, Any]:
    broker = RedisBroker(url=f"redis://127.0.0.1:{port}/0")
    install(broker, **options)
    client = redis.Redis(port=port)

    @dramatiq.actor(broker=broker, idempotency_key="{key}", queue_name="jobs")
    def long(key: str, seconds: float) -> None:
        client.set("runs", 1)
        time.sleep(seconds)

    @dramatiq.actor(broker=broker, idempotency_key="{number}", queue_name="jobs")
    def other(number: int, sent: float) -> None:
        client.rpush("waits", time.time() - sent)

    return broker, long, other


def work(port: int) -> None:
    outcomes: Counter[str] = Counter()

    def count(event: OutcomeEvent) -> None:
        outcomes[event.outcome.value] += 1

    broker, _, _ = app(port, error_classifier=ErrorClassifier(on_outcome=count))
    worker = dramatiq.Worker(broker, worker_threads=8)
    began = cpu()
    worker.start()
    client = redis.Redis(port=port)
    while not client.exists("stop"):
        time.sleep(0.1)
    used = cpu() - began
    print(json.dumps({"cpu_seconds": round(used, 1), "outcomes": outcomes}), flush=True)
    os._exit(0)


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(duplicates: int, seconds: float) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            ["redis-server", "--port", str(port), "--save", "", "--dir", folder],
            stdout=subprocess.DEVNULL,
        )
        try:
            client = redis.Redis(port=port)
            while True:
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    time.sleep(0.05)
            return _measure(client, port, duplicates, seconds)
        finally:
            server.terminate()
            server.wait()


def _measure(client: Any, port: int, duplicates: int, seconds: float) -> dict[str, Any]:
    _, long, other = app(port)
    long.send("the one", seconds + 60)
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.duplicates", "--worker", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[1],
    ) as worker:
        while not client.exists("runs"):
            time.sleep(0.05)
        for _ in range(duplicates):
            long.send("the one", 0)
        before = _commands(client)
        sent, ends = 0, time.time() + seconds
        while time.time() < ends:
            other.send(sent, time.time())
            sent += 1
            time.sleep(0.1)
        time.sleep(3)
        client.set("stop", 1)
        assert worker.stdout is not None
        seen = json.loads(worker.stdout.read())
    waits = sorted(float(wait) for wait in client.lrange("waits", 0, -1))
    return {
        **seen,
        "commands": _commands(client) - before - sent,
        "redis_cpu_seconds": round(client.info("cpu")["used_cpu_user"] + client.info("cpu")["used_cpu_sys"], 1),
        "others": {
            "sent": sent,
            "run": len(waits),
            "wait_median_s": round(statistics.median(waits), 3) if waits else None,
            "wait_p95_s": round(waits[int(len(waits) * 0.95)], 3) if waits else None,
            "wait_max_s": round(waits[-1], 3) if waits else None,
        },
    }


def _commands(client: Any) -> int:
    return sum(found["calls"] for found in client.info("commandstats").values())


if __name__ == "__main__":
    main()
