"""The common part of workers with sync and with async jobs: the tables, the broker, and a note of each run."""

from __future__ import annotations

import itertools
import os
import time
from typing import Any

import sqlalchemy as sa
from dramatiq.middleware import AsyncIO, GroupCallbacks
from dramatiq.rate_limits.backends import RedisBackend as Barriers

from dramatiq_policies import Idempotency, RetryPolicy, constant, current_job, install
from dramatiq_policies.sql import SqlOutbox, SqlStore

from .clients import redis_client

LEDGER = os.open(os.environ["CHAOS_LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
LEASE = int(os.environ["CHAOS_LEASE"])
#: Of the engine of a worker.
POOL: Any = {"pool_size": 8, "pool_pre_ping": True}

tables = sa.MetaData()
orders = sa.Table("orders", tables, sa.Column("number", sa.Integer, primary_key=True, autoincrement=False))
#: No constraint keeps a job from having two.
effects = sa.Table(
    "effects", tables, sa.Column("id", sa.Integer, primary_key=True), sa.Column("job", sa.String(64), nullable=False)
)

numbers = itertools.count(1)


class Transient(Exception):
    pass


class Permanent(Exception):
    pass


again = RetryPolicy(attempts=50, wait=constant(300))
once: Any = {
    "queue_name": "jobs",
    "idempotency_key": "{number}",
    "transactional": True,
    # A database that is down is no end. asyncpg's errors at the connection are OSErrors.
    "retry_on": {(sa.exc.DBAPIError, OSError, Transient): again},
}


def make_broker(engine: Any) -> tuple[Any, SqlOutbox]:
    url = os.environ["CHAOS_URL"]
    if url.startswith("amqp"):
        from dramatiq.brokers.rabbitmq import RabbitmqBroker

        broker: Any = RabbitmqBroker(url=url, confirm_delivery=True)
    else:
        from dramatiq.brokers.redis import RedisBroker

        broker = RedisBroker(client=redis_client(url), heartbeat_timeout=int(os.environ["CHAOS_HEARTBEAT_TIMEOUT"]))
    broker.add_middleware(GroupCallbacks(Barriers(client=redis_client(os.environ["CHAOS_STORE"]))))
    broker.add_middleware(AsyncIO())
    outbox = SqlOutbox(engine, lease=LEASE)
    # A job that is killed with its worker again and again is no loss to be excused.
    install(broker, outbox=outbox, idempotency=Idempotency(SqlStore(engine), lease=LEASE, max_crashes=None))
    return broker, outbox


def begin(number: int) -> dict[str, str]:
    """Note a run in the ledger. Returns the row of its effect."""
    job = current_job()
    name = f"{job.actor}:{number}"
    words = (time.monotonic(), os.getpid(), "begin", f"{os.getpid()}.{next(numbers)}", name, job.message_id)
    os.write(LEDGER, (" ".join(map(str, words)) + "\n").encode())
    return {"job": name}
