"""Transactional jobs: each effect is a row of the job's transaction, and a second row for the same job is a doubled effect."""

from __future__ import annotations

import itertools
import os
import random
import time
from typing import Any

import dramatiq
import sqlalchemy as sa
from dramatiq.middleware import GroupCallbacks
from dramatiq.rate_limits.backends import RedisBackend as Barriers

from dramatiq_policies import Idempotency, RetryPolicy, constant, current_job, install
from dramatiq_policies.sql import SqlOutbox, SqlStore

from .clients import redis_client
from .orders import message

LEDGER = os.open(os.environ["CHAOS_LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
LEASE = int(os.environ["CHAOS_LEASE"])

tables = sa.MetaData()
orders = sa.Table("orders", tables, sa.Column("number", sa.Integer, primary_key=True, autoincrement=False))
#: No constraint keeps a job from having two.
effects = sa.Table(
    "effects", tables, sa.Column("id", sa.Integer, primary_key=True), sa.Column("job", sa.String(64), nullable=False)
)

engine = sa.create_engine(os.environ["CHAOS_DATABASE"], pool_size=8, pool_pre_ping=True)
outbox = SqlOutbox(engine, lease=LEASE)
numbers = itertools.count(1)


class Transient(Exception):
    pass


class Permanent(Exception):
    pass


def make_broker() -> Any:
    url = os.environ["CHAOS_URL"]
    if url.startswith("amqp"):
        from dramatiq.brokers.rabbitmq import RabbitmqBroker

        broker: Any = RabbitmqBroker(url=url, confirm_delivery=True)
    else:
        from dramatiq.brokers.redis import RedisBroker

        broker = RedisBroker(client=redis_client(url), heartbeat_timeout=int(os.environ["CHAOS_HEARTBEAT_TIMEOUT"]))
    broker.add_middleware(GroupCallbacks(Barriers(client=redis_client(os.environ["CHAOS_STORE"]))))
    # A job that is killed with its worker again and again is no loss to be excused.
    return install(broker, outbox=outbox, idempotency=Idempotency(SqlStore(engine), lease=LEASE, max_crashes=None))


broker = make_broker()
dramatiq.set_broker(broker)


def make_effect(number: int) -> None:
    """One effect somewhere in the middle of the job."""
    job = current_job()
    name = f"{job.actor}:{number}"
    words = (time.monotonic(), os.getpid(), "begin", f"{os.getpid()}.{next(numbers)}", name, job.message_id)
    os.write(LEDGER, (" ".join(map(str, words)) + "\n").encode())
    time.sleep(random.uniform(0, 0.05))
    job.session.execute(effects.insert(), {"job": name})
    time.sleep(random.uniform(0, 0.05))


again = RetryPolicy(attempts=50, wait=constant(300))
once: Any = {
    "queue_name": "jobs",
    "idempotency_key": "{number}",
    "transactional": True,
    # A database that is down is no end.
    "retry_on": {(sa.exc.DBAPIError, Transient): again},
}


@dramatiq.actor(**once)
def plain(number: int) -> None:
    make_effect(number)


@dramatiq.actor(**once)
def flaky(number: int) -> None:
    make_effect(number)
    if current_job().attempt == 1:
        raise Transient(number)


@dramatiq.actor(max_retries=0, **once)
def hopeless(number: int) -> None:
    make_effect(number)
    raise Permanent(number)


@dramatiq.actor(**once)
def parent(number: int) -> None:
    broker.enqueue(message("child", number))
    make_effect(number)
    try:
        with current_job().session.begin_nested():
            broker.enqueue(message("never", number))
            raise Transient
    except Transient:
        pass


@dramatiq.actor(**once)
def child(number: int) -> None:
    make_effect(number)


@dramatiq.actor(**once)
def never(number: int) -> None:
    make_effect(number)


@dramatiq.actor(**once)
def first(number: int) -> int:
    make_effect(number)
    return number


@dramatiq.actor(**once)
def second(number: int) -> None:
    make_effect(number)


@dramatiq.actor(**once)
def member(number: int) -> None:
    make_effect(number)


@dramatiq.actor(**once)
def together(number: int) -> None:
    make_effect(number)
