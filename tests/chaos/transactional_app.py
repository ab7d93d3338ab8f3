"""Transactional jobs: each effect is a row of the job's transaction, and a second row for the same job is a doubled effect."""

from __future__ import annotations

import os
import random
import time

import dramatiq
import sqlalchemy as sa

from dramatiq_policies import current_job
from tests.integration.databases import with_driver

from .orders import message
from .transactional_worker import POOL, Permanent, Transient, begin, effects, make_broker, once

engine = sa.create_engine(with_driver(os.environ["CHAOS_DATABASE"]), **POOL)
broker, outbox = make_broker(engine)
dramatiq.set_broker(broker)


def make_effect(number: int) -> None:
    """One effect somewhere in the middle of the job."""
    row = begin(number)
    time.sleep(random.uniform(0, 0.05))
    current_job().session.execute(effects.insert(), row)
    time.sleep(random.uniform(0, 0.05))


for name in ("plain", "child", "never", "second", "member", "together"):
    dramatiq.actor(make_effect, actor_name=name, **once)


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
def first(number: int) -> int:
    make_effect(number)
    return number
