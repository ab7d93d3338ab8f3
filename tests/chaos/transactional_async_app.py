"""The same jobs as coroutines, with an async engine."""

from __future__ import annotations

import asyncio
import os
import random

import dramatiq

from dramatiq_policies import current_job
from tests.integration.databases import async_engine

from .orders import message
from .transactional_worker import POOL, Permanent, Transient, begin, effects, make_broker, once

engine = async_engine(os.environ["CHAOS_DATABASE"], **POOL)
broker, outbox = make_broker(engine)
dramatiq.set_broker(broker)


async def make_effect(number: int) -> None:
    """One effect somewhere in the middle of the job."""
    row = begin(number)
    await asyncio.sleep(random.uniform(0, 0.05))
    await current_job().session.execute(effects.insert(), row)
    await asyncio.sleep(random.uniform(0, 0.05))


for name in ("plain", "child", "never", "second", "member", "together"):
    dramatiq.actor(make_effect, actor_name=name, **once)


@dramatiq.actor(**once)
async def flaky(number: int) -> None:
    await make_effect(number)
    if current_job().attempt == 1:
        raise Transient(number)


@dramatiq.actor(max_retries=0, **once)
async def hopeless(number: int) -> None:
    await make_effect(number)
    raise Permanent(number)


@dramatiq.actor(**once)
async def parent(number: int) -> None:
    broker.enqueue(message("child", number))
    await make_effect(number)
    try:
        async with current_job().session.begin_nested():
            broker.enqueue(message("never", number))
            raise Transient
    except Transient:
        pass


@dramatiq.actor(**once)
async def first(number: int) -> int:
    await make_effect(number)
    return number
