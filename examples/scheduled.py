"""Scheduling with APScheduler: a process sends, the workers run.

python -m examples.scheduled      dramatiq examples.scheduled

The day is an argument from the planned time, so a late or repeated job reports the right day.
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
    idempotency_key="nightly:{day}",  # two schedulers still make one report
    timeout=timedelta(minutes=10),
    queue_timeout=timedelta(hours=20),  # the next report replaces it
)
def nightly_report(day: str) -> None:
    """Write the report of a day."""
    reports.append(f"the figures of {day}")


def send_report(now: datetime | None = None) -> None:
    """Send the report of the day before."""
    now = datetime.now(timezone.utc) if now is None else now
    nightly_report.send((now - timedelta(days=1)).date().isoformat())


def make_scheduler(kind: type[BaseScheduler] = BlockingScheduler) -> BaseScheduler:
    """Make a scheduler for three each night. After a downtime it sends up to an hour late, and once for all missed
    runs."""
    scheduler = kind(timezone=timezone.utc)
    scheduler.add_job(
        send_report, CronTrigger(hour=3, timezone=timezone.utc), id="nightly", misfire_grace_time=3_600, coalesce=True
    )
    return scheduler


if __name__ == "__main__":
    make_scheduler().start()
