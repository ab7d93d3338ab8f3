"""`Idempotency.state` and `Idempotency.forget`."""

from __future__ import annotations

import asyncio
import threading
import time

import dramatiq
import pytest
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import AsyncIO

from dramatiq_policies import (
    ConfigurationError,
    Idempotency,
    RetryPolicy,
    constant,
)
from dramatiq_policies.stores.memory import MemoryStore

from ..support import Stage
from .jobs import Transient


def test_state_and_forget():
    stage = Stage()
    entered, go_on = threading.Event(), threading.Event()

    @stage.actor(idempotency_key="{order_id}")
    def ship(order_id):
        entered.set()
        assert go_on.wait(10)

    assert Idempotency.state(ship, 7).state == "none"
    with stage.working():
        message = ship.send(7)
        assert entered.wait(10)
        running = Idempotency.state(ship, order_id=7)
        assert (running.state, running.message_id, running.key) == ("running", message.message_id, "7")
        assert abs(running.since - time.time() * 1_000) < 10_000
        assert running.owner
        assert 50_000 < running.left_ms <= 60_000  # the lease
        go_on.set()
        stage.drain()
    assert Idempotency.state(ship, 7).state == "completed"
    assert 86_390_000 < Idempotency.state(ship, 7).left_ms <= 86_400_000  # the ttl
    assert Idempotency.state(ship, 7).message_id == message.message_id
    assert Idempotency.forget(ship, 7)
    assert not Idempotency.forget(ship, 7)
    assert Idempotency.state(ship, 7).state == "none"
    ship.send(7)
    stage.run()
    assert stage.outcomes() == ["succeeded", "succeeded"]


def test_a_key_that_an_async_actors_coroutine_makes_is_known_outside_a_worker_too():
    async def of_order(order_id):
        return f"order:{order_id}"

    class OfOrder:
        async def __call__(self, order_id):
            return f"order:{order_id}"

    async def look(actor):
        return Idempotency.state(actor, 7)

    for make in (of_order, OfOrder()):
        stage = Stage(middleware=[AsyncIO()])

        @stage.actor(idempotency_key=make)
        async def ship(order_id):
            pass

        ship.send(7)
        stage.run()
        assert stage.outcomes() == ["succeeded"]
        assert Idempotency.state(ship, 7).state == "completed"
        assert asyncio.run(look(ship)).key == "order:7"
        assert Idempotency.forget(ship, order_id=7)


def test_the_state_of_an_actor_without_a_key_is_refused():
    stage = Stage()
    job = stage.actor(lambda: None, actor_name="job")
    with pytest.raises(ConfigurationError, match="no idempotency key"):
        Idempotency.state(job)


def test_the_state_is_asked_of_a_message_of_the_global_broker_too(monkeypatch):
    stage = Stage()
    monkeypatch.setattr(dramatiq.broker, "global_broker", stage.broker)

    @stage.actor(idempotency_key=lambda order_id: f"order:{order_id}")
    def ship(order_id):
        pass

    message = ship.send(7)
    stage.run()
    state = Idempotency.state(message)
    assert (state.state, state.key, state.message_id) == ("completed", "order:7", message.message_id)


@pytest.mark.parametrize("arguments", [(), (7,), ("a", "b")])
def test_the_message_id_is_required_for_an_actor_that_is_idempotent_by_it(arguments):
    stage = Stage()
    job = stage.actor(lambda: None, actor_name="job", idempotent=True)
    with pytest.raises(ConfigurationError, match="pass the id, or the message"):
        Idempotency.state(job, *arguments)


def test_a_wait_that_is_over_holds_no_key():
    stage, now = Stage(bundle={"idempotency": Idempotency(MemoryStore(clock=lambda: now[0]))}), [0.0]

    @stage.actor(idempotency_key="{order_id}", retry_on={Transient: RetryPolicy(attempts=2, wait=constant(60_000))})
    def ship(order_id):
        raise Transient

    with stage.working():
        ship.send(7)
        stage.collected.wait_for(lambda events: events)
    waiting = Idempotency.state(ship, 7)
    assert waiting.state == "waiting"
    now[0] += waiting.left_ms / 1_000 + 1
    assert Idempotency.state(ship, 7).state == "none"


def test_the_state_of_a_job_that_is_idempotent_by_message_id_is_asked_by_that_id():
    stage = Stage()
    job = stage.actor(lambda: None, actor_name="job", idempotent=True)
    message, other = job.send(), job.message()
    stage.run()
    assert Idempotency.state(job, message.message_id).state == "completed"
    assert Idempotency.state(job, message.message_id).key == message.message_id
    assert Idempotency.state(job, other.message_id).state == "none"


def test_the_state_is_not_to_be_had_where_there_is_no_idempotency():
    unguarded = Stage(bundle={"idempotency": False})
    without_store = Stage(broker=RabbitmqBroker(url="amqp://nowhere.invalid"), bundle={"idempotency": Idempotency()})
    elsewhere = StubBroker()
    for actor in (
        unguarded.actor(lambda order_id: None, actor_name="ship"),
        without_store.actor(lambda order_id: None, actor_name="ship"),
        dramatiq.actor(lambda order_id: None, actor_name="ship", broker=elsewhere),
    ):
        with pytest.raises(
            ConfigurationError, match=r"actor 'ship': the broker has no Idempotency with a store\. (Pass one|Add Idem)"
        ):
            Idempotency.state(actor, 7)
