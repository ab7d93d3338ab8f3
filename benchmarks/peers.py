"""The same jobs on Celery and on Sidekiq with Active Job: one process, eight threads, the same Redis.

Measured by ``benchmarks.drain --variants stock bundle celery sidekiq``, each in a process of its own. Celery is to be
installed with pip, Sidekiq and Active Job with ``apt-get install ruby-sidekiq ruby-activejob``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .variants import ATTEMPTS, FAILURES, REDIS_URL, Permanent, Transient, Workload

__all__ = ["PEERS", "available"]

THREADS = 8
PEERS = ("celery", "sidekiq")


def available(peer: str) -> bool:
    """Whether it can be measured here."""
    return importlib.util.find_spec("celery") is not None if peer == "celery" else shutil.which("sidekiq") is not None


def drain_celery(settings: dict[str, Any]) -> None:
    """Enqueue, drain, print what was measured."""
    from celery import Celery

    marks: list[tuple[float, float]] = []

    def mark() -> None:
        marks.append((time.perf_counter(), time.process_time()))

    def on_last() -> None:
        mark()
        (first, first_cpu), (last, last_cpu) = marks
        jobs = settings["jobs"]
        measured = {
            "rate": jobs / (last - first),
            "cpu_us": (last_cpu - first_cpu) / jobs * 1e6,
            "enqueue_rate": jobs / enqueued,
            "runs": workload.runs,
        }
        print(json.dumps(measured), flush=True)
        os._exit(0)

    workload = Workload(settings["jobs"], settings["failures"], on_first=mark, on_last=on_last)
    app = Celery("peer", broker=REDIS_URL)
    app.conf.update(
        task_ignore_result=True,
        task_acks_late=True,
        task_default_queue=settings["name"],
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
    )
    if settings["prefetch"] != "default":
        app.conf.worker_prefetch_multiplier = int(settings["prefetch"]) // THREADS

    @app.task(
        autoretry_for=(Transient,),
        throws=(Permanent,),
        retry_backoff=False,
        default_retry_delay=0,
        max_retries=ATTEMPTS - 1,
    )
    def job(number: int) -> None:
        workload.run(number)

    began = time.perf_counter()
    for number in range(settings["jobs"]):
        job.delay(number)
    enqueued = time.perf_counter() - began
    app.Worker(
        pool="threads", concurrency=THREADS, loglevel="CRITICAL", without_gossip=True, without_mingle=True
    ).start()


def drain_sidekiq(settings: dict[str, Any]) -> None:
    """The same in Ruby."""
    transient, permanent = FAILURES[settings["failures"]]
    environment = {
        **os.environ,
        "BENCH_REDIS": REDIS_URL,
        "BENCH_JOBS": str(settings["jobs"]),
        "BENCH_QUEUE": settings["name"],
        "FAIL_TRANSIENT": str(transient),
        "FAIL_PERMANENT": str(permanent),
    }
    script = str(Path(__file__).with_name("sidekiq_job.rb"))
    command = ["sidekiq", "-r", script, "-c", str(THREADS), "-q", settings["name"]]
    pushed = _output_of(["ruby", "-r", script, "-e", "push_all"], environment)
    drained = _output_of(command, environment)
    measured = next(json.loads(line) for line in drained.splitlines() if line.startswith('{"rate"'))
    print(json.dumps({**measured, **json.loads(pushed), "runs": settings["jobs"]}), flush=True)


def _output_of(command: list[str], environment: dict[str, str]) -> str:
    # It ends by killing itself; this version warns at every push.
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=240, check=False
    )
    return done.stdout


def main() -> None:
    """Measure one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", required=True)
    settings = json.loads(parser.parse_args().measure)
    if settings["broker"] != "redis":
        sys.exit("the peers are measured on Redis")
    {"celery": drain_celery, "sidekiq": drain_sidekiq}[settings["variant"]](settings)


if __name__ == "__main__":
    main()
