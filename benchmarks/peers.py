"""The same jobs on Celery and on Sidekiq with Active Job: one process, eight threads, the same servers.

Each runs in a separate process, for comparison with ``benchmarks.drain``. Celery comes with the extra ``bench``, Sidekiq and Active
Job with ``apt-get install ruby-sidekiq ruby-activejob``; Sidekiq is on Redis only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .variants import ATTEMPTS, FAILURES, RABBITMQ_URL, REDIS_URL, Permanent, Transient, Workload

__all__ = ["PEERS", "available", "peer_versions"]

PEERS = ("celery", "sidekiq")


def available(peer: str) -> bool:
    """Whether it can be measured here."""
    return importlib.util.find_spec("celery") is not None if peer == "celery" else shutil.which("sidekiq") is not None


def peer_versions(variants: list[str]) -> dict[str, str | None]:
    """Of those that are measured."""
    found: dict[str, str | None] = {}
    if "celery" in variants:
        found["celery"] = version("celery")
    if "sidekiq" in variants:
        code = "require 'sidekiq'; require 'active_job'; puts [RUBY_VERSION, Sidekiq::VERSION, ActiveJob.version].join(' ')"
        ruby = subprocess.run(["ruby", "-e", code], capture_output=True, text=True, check=True).stdout.split()
        found.update(zip(("ruby", "sidekiq", "activejob"), ruby, strict=True))
    return found


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
        }
        print(json.dumps(measured), flush=True)
        os._exit(0)

    workload = Workload(settings["jobs"], settings["failures"], on_first=mark, on_last=on_last)
    app = Celery("peer", broker=REDIS_URL if settings["broker"] == "redis" else RABBITMQ_URL + "//")
    app.conf.update(
        task_ignore_result=True,
        task_acks_late=True,
        task_default_queue=settings["name"],
        worker_enable_remote_control=False,  # leaves queues behind
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
    )
    if settings["broker"] == "redis":
        app.conf.broker_transport_options = {
            f"{key}_key": f"{settings['name']}:{key}" for key in ("unacked", "unacked_index", "unacked_mutex")
        }
    if settings["prefetch"] != "default":
        app.conf.worker_prefetch_multiplier = int(settings["prefetch"]) // settings["threads"]

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
        pool="threads", concurrency=settings["threads"], loglevel="CRITICAL", without_gossip=True, without_mingle=True
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
    command = ["sidekiq", "-r", script, "-c", str(settings["threads"]), "-q", settings["name"]]
    pushed = _output_of(["ruby", "-r", script, "-e", "push_all"], environment)
    drained = _output_of(command, environment)
    measured = next(json.loads(line) for line in drained.splitlines() if line.startswith('{"rate"'))
    print(json.dumps({**measured, **json.loads(pushed)}), flush=True)


def _output_of(command: list[str], environment: dict[str, str]) -> str:
    # Sidekiq ends by a signal to its own process, and warns at every push.
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=240, check=False
    )
    return done.stdout


def main() -> None:
    """Measure one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", required=True)
    settings = json.loads(parser.parse_args().measure)
    {"celery": drain_celery, "sidekiq": drain_sidekiq}[settings["variant"]](settings)


if __name__ == "__main__":
    main()
