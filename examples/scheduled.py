"""Jobs by the clock, with APScheduler: a process that only sends, beside the workers that run.

python -m examples.scheduled      dramatiq examples.scheduled

The day is an argument, taken from the time that was planned: a job that comes late, or twice, knows which day it is about.
"""

from __future__ import annotations

import os
from datetime import datetime, timedelta, timezone

import dramatiq
from apscheduler.schedulers.base import BaseScheduler
from apscheduler.schedulers.blocking import BlockingScheduler
from apscheduler.triggers.cron import CronTrigger
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker

from dramatiq_policies import ErrorClassifier, RetryPolicy, install

BROKER_URL = os.environ.get("BROKER_URL", "redis://localhost:6379/0")
broker = StubBroker() if BROKER_URL.startswith("stub") else RedisBroker(url=BROKER_URL)
install(broker, error_classifier=ErrorClassifier(unclassified=RetryPolicy(attempts=5)))
dramatiq.set_broker(broker)

reports: list[str] = []


@dramatiq.actor(
    queue_name="reports",
    retry_on={ConnectionError: RetryPolicy(attempts=5)},
    discard_on=(),
    idempotency_key="nightly:{day}",  # two schedulers, or one that fires twice: still one report
    timeout=timedelta(minutes=10),
    queue_timeout=timedelta(hours=20),  # tomorrow's makes it worthless
)
def nightly_report(day: str) -> None:
    """Yesterday's figures are there when the office opens."""
    reports.append(f"the figures of {day}")


def send_report(now: datetime | None = None) -> None:
    """Send the report of the day before."""
    now = datetime.now(timezone.utc) if now is None else now
    nightly_report.send((now - timedelta(days=1)).date().isoformat())


def make_scheduler(kind: type[BaseScheduler] = BlockingScheduler) -> BaseScheduler:
    """At three each night. A scheduler that was down sends late, up to an hour, and once for all that it missed."""
    scheduler = kind(timezone=timezone.utc)
    scheduler.add_job(
        send_report, CronTrigger(hour=3, timezone=timezone.utc), id="nightly", misfire_grace_time=3_600, coalesce=True
    )
    return scheduler


if __name__ == "__main__":
    make_scheduler().start()
