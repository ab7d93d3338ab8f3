"""A function may be that of several actors, and copied by decorators: each actor's own options are in force."""

from __future__ import annotations

import functools
import time

import dramatiq
import pytest
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import AsyncIO

from dramatiq_policies import Idempotency, current_job, install
from dramatiq_policies.common.callables import unwrapped
from dramatiq_policies.stores.memory import MemoryStore

from ..support import Stage


def seen(stage, actor_name):
    return [(str(event.outcome.value), event.reason) for event in stage.events if event.actor == actor_name]


def second_by_name(fn):
    return fn


def second_by_a_copy(fn):
    @functools.wraps(fn)
    def copy(*args, **kwargs):
        return fn(*args, **kwargs)

    return copy


@pytest.mark.parametrize("second", [second_by_name, second_by_a_copy])
@pytest.mark.parametrize("middleware", [(), (AsyncIO,)], ids=["sync", "async"])
def test_a_second_actor_of_a_function_has_its_own_timeout_key_and_job(second, middleware):
    stage, jobs = Stage(middleware=[kind() for kind in middleware]), []

    def export(n):
        jobs.append((current_job().actor, current_job().idempotency_key, current_job().remaining_ms() > 1_000))
        deadline = time.monotonic() + 20
        while n == 2 and time.monotonic() < deadline:
            time.sleep(0.001)

    async def export_async(n):
        jobs.append((current_job().actor, current_job().idempotency_key, current_job().remaining_ms() > 1_000))
        import asyncio

        if n == 2:
            await asyncio.sleep(20)

    fn = export_async if middleware else export
    first = stage.actor(fn, actor_name="first", timeout=60_000, idempotency_key="first:{n}")
    other = stage.actor(
        second(first.fn), actor_name="other", timeout=100, idempotency_key="other:{n}", max_retries=0, queue_name="slow"
    )
    for actor in (first, other):
        actor.send(1)
        actor.send(1)
    other.send(2)
    stage.run()
    done = [("succeeded", None), ("duplicate", "completed")]
    assert seen(stage, "first") == done
    assert sorted(seen(stage, "other"), key=str) == sorted([*done, ("dead", "unclassified")], key=str)
    assert sorted(jobs)[:2] == [("first", "first:1", True), ("other", "other:1", False)]


def test_the_same_name_on_a_second_broker_claims_in_that_brokers_store():
    stores = [MemoryStore(), MemoryStore()]
    one, two = (install(StubBroker(), idempotency=Idempotency(store=store)) for store in stores)

    def job(n):
        ran.append(n)

    ran = []
    first = dramatiq.actor(job, broker=one, idempotency_key="k:{n}")
    again = dramatiq.actor(first.fn, actor_name="job", broker=two, idempotency_key="k:{n}")
    again.send(1)
    worker = dramatiq.Worker(two, worker_timeout=20)
    worker.start()
    two.join("default")
    worker.stop()
    assert [Idempotency.state(actor, 1).state for actor in (first, again)] == ["none", "completed"]
    assert ran == [1]


def test_a_second_actor_is_wrapped_once_and_the_first_stays_as_it_was():
    stage = Stage()
    first = stage.actor(lambda: None, actor_name="first")
    wrapper = first.fn
    other = stage.actor(first.fn, actor_name="other")
    assert first.fn is wrapper
    assert other.fn is not wrapper
    assert unwrapped(other.fn) is unwrapped(wrapper)


def test_a_copy_of_a_wrapper_is_no_wrapper():
    stage = Stage()
    first = stage.actor(lambda: None, actor_name="first")
    copy = second_by_a_copy(first.fn)
    assert unwrapped(copy) is copy


def test_an_actors_function_that_a_second_actors_job_calls_is_a_plain_call():
    stage, jobs = Stage(), []
    inner = stage.actor(lambda: jobs.append(current_job().actor), actor_name="inner", timeout=50)
    outer = stage.actor(lambda: inner.fn() or None, actor_name="outer")
    outer.send()
    assert stage.run().outcomes() == ["succeeded"]
    assert jobs == ["outer"]
