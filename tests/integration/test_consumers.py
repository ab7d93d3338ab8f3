"""Rare errors of the consumers on real servers."""

from __future__ import annotations

import json
import threading
import time
from types import SimpleNamespace
from typing import Any

import pika.exceptions
import pytest
import redis
from dramatiq.errors import ConnectionClosed

from dramatiq_policies import Idempotency, RetryPolicy, constant
from dramatiq_policies._redis import CommandBatcher, DeferredCommand
from dramatiq_policies.brokers.rabbitmq.publisher import ConfirmedPublisher
from dramatiq_policies.brokers.redis.transport import RedisTransport
from dramatiq_policies.delivery.broker_state import state_of
from dramatiq_policies.stores.memory import MemoryStore

from .places import App, RabbitmqPlace, RedisPlace, until

pytestmark = pytest.mark.usefixtures("quick_restarts")


class Transient(Exception):
    pass


def taken(app: App) -> tuple[Any, Any]:
    """A message that was sent, and the consumer that has delivered it."""
    job = app.actor(lambda: None, actor_name="job")
    job.send()
    consumer = app.broker.consume(app.place.queue, timeout=100)
    message = until(lambda: next(consumer))
    return consumer, message


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception) -> None:
    stock, left = getattr(owner, name), [error]

    def failing(*args: Any, **kwargs: Any) -> Any:
        if left:
            raise left.pop()
        return stock(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


# Redis.


def test_an_error_of_the_socket_is_a_lost_connection(redis_place: RedisPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    app = redis_place.app()
    job = app.actor(lambda: None, actor_name="job")
    job.send()
    fail_once(monkeypatch, RedisTransport, "_take_off", OSError("the cable"))
    app.work_until("succeeded")
    assert redis_place.left() == []


def test_a_worker_outside_the_command_that_redis_refuses_permanently_logs_that_it_must_be_stopped(
    redis_place: RedisPlace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = redis_place.app()
    app.actor(lambda: None, actor_name="job")
    monkeypatch.setattr(RedisTransport, "_take_off", lambda *args: refuse())
    with app.working():
        until(lambda: "Redis permanently refuses this worker" in caplog.text)
        time.sleep(0.3)
    said = [record for record in caplog.records if "permanently" in record.getMessage()]
    assert [record.levelname for record in said] == ["CRITICAL"]
    assert said[0].getMessage().endswith("Stop the worker and correct the cause.")


def refuse() -> None:
    raise redis.AuthenticationError("WRONGPASS invalid username-password pair")


def test_an_ack_that_is_lost_while_the_worker_stops_is_logged_and_the_message_is_redelivered(
    redis_place: RedisPlace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    consumer, message = taken(redis_place.app())
    fail_once(monkeypatch, consumer.transport.settling, "run", ConnectionClosed("gone"))
    consumer.state.stopping.set()
    consumer.transport.ack(message)
    assert f"Message {message.message_id} of actor {message.actor_name} could not be acknowledged" in caplog.text
    assert [left.message_id for left in redis_place.left()] == [message.message_id]


def test_an_id_that_is_no_string_is_dead_raw(redis_place: RedisPlace) -> None:
    app = redis_place.app()
    job = app.actor(lambda: None, actor_name="job")
    app.broker.declare_queue(redis_place.queue)
    body = json.dumps({**job.message().asdict(), "options": {"redis_message_id": 7}}).encode()
    redis_place.push(body)
    job.send()
    app.work_until("dead", "succeeded")
    assert [event.reason for event in app.events if event.outcome == "dead"] == ["malformed"]
    assert redis_place.dead_bodies() == [body]


def test_an_unreadable_message_returns_from_a_dead_worker_unchanged(redis_place: RedisPlace) -> None:
    dead = redis_place.broker()
    dead.heartbeat_timeout = 1_000
    dead.declare_queue(redis_place.queue)
    redis_place.push(b"not json")
    assert dead.do_fetch(redis_place.queue, 1) == [b"not json"]
    broker = redis_place.broker()
    broker.heartbeat_timeout = 1_000
    app = redis_place.app(broker=broker)
    app.actor(lambda: None, actor_name="job")
    app.work_until("dead")
    assert [event.reason for event in app.events] == ["malformed"]
    assert redis_place.dead_bodies() == [b"not json"]


def test_a_completion_on_another_redis_carries_no_ack(redis_place: RedisPlace) -> None:
    app = redis_place.app(idempotency=Idempotency(MemoryStore()))
    consumer, _ = taken(app)
    keeper = SimpleNamespace(store=MemoryStore(), completion_command=lambda claim: ("the", claim))
    state_of(app.broker).idempotency.keeper = keeper
    delivery = SimpleNamespace(completes_key=lambda: True, claim="command")
    assert consumer.transport.completion_command(delivery) == (("the", "command"), False)


@pytest.mark.parametrize("packed", [True, False], ids=["packed by hiredis", "packed by redis-py"])
def test_round_trips_need_no_hiredis(
    redis_client: redis.Redis, redis_namespace: str, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    if not packed:
        monkeypatch.setattr("dramatiq_policies._redis._pack", None)
    commands = [("SET", f"{redis_namespace}:a", b"\xff", "PX", 5_000), ("GET", f"{redis_namespace}:a")]
    assert CommandBatcher(redis_client).execute(commands) == [b"OK", b"\xff"]


@pytest.mark.parametrize("packed", [True, False], ids=["packed by hiredis", "packed by redis-py"])
@pytest.mark.parametrize("poison", ["\ud800", None, object()], ids=["half a character", "None", "an object"])
def test_a_call_that_can_not_be_sent_fails_alone(
    redis_client: redis.Redis, redis_namespace: str, monkeypatch: pytest.MonkeyPatch, packed: bool, poison: object
) -> None:
    if not packed:
        monkeypatch.setattr("dramatiq_policies._redis._pack", None)
    batcher = CommandBatcher(redis_client)
    key = f"{redis_namespace}:a"
    told: list[Any] = []
    batcher.post(DeferredCommand(("SET", key, "posted", "PX", 5_000), told.append))
    batcher.post(DeferredCommand(("SET", key, poison), told.append))
    good, bad = [], []

    def ask(command: tuple[Any, ...], answers: list[Any]) -> None:
        try:
            answers.append(batcher.call(*command, carries=True))
        except Exception as error:
            answers.append(error)

    for _ in range(20):
        threads = [threading.Thread(target=ask, args=(("GET", key), good)) for _ in range(4)]
        threads.append(threading.Thread(target=ask, args=(("GET", poison), bad)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert good == [b"posted"] * 80
    assert {type(error) for error in bad} <= {UnicodeEncodeError, TypeError, redis.DataError}
    assert told[0] == b"OK"
    assert isinstance(told[1], (UnicodeEncodeError, TypeError, redis.DataError))
    with pytest.raises((UnicodeEncodeError, TypeError, redis.DataError)):
        batcher.call("GET", poison)


# RabbitMQ.


def test_a_message_failed_by_another_middleware_whose_ack_is_lost_is_a_dead_letter_once(
    rabbitmq_place: RabbitmqPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = rabbitmq_place.app()
    consumer, message = taken(app)
    message.fail()
    fail_once(monkeypatch, consumer.transport, "ack", ConnectionClosed("gone"))
    with pytest.raises(ConnectionClosed):
        consumer.nack(message)
    consumer.nack(message)
    consumer.close()
    assert app.outcomes == ["skipped"]
    assert [letter.message_id for letter in rabbitmq_place.dead()] == [message.message_id]
    assert rabbitmq_place.left() == []


def test_a_body_that_can_t_be_read_and_whose_dead_letter_is_lost_is_read_again(
    rabbitmq_place: RabbitmqPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = rabbitmq_place.app()
    app.actor(lambda: None, actor_name="job")
    app.broker.declare_queue(rabbitmq_place.queue, ensure=True)
    rabbitmq_place.push(b"not json")
    fail_once(monkeypatch, ConfirmedPublisher, "publish", ConnectionError("gone"))
    app.work_until("dead")
    assert rabbitmq_place.dead_bodies() == [b"not json"]
    assert rabbitmq_place.left() == []


def test_a_work_queue_that_was_deleted_is_declared_again(rabbitmq_place: RabbitmqPlace) -> None:
    app = rabbitmq_place.app()
    job = app.actor(lambda: None, actor_name="job")
    job.send()
    with app.working():
        app.wait_for("succeeded")
        rabbitmq_place.channel.queue_delete(rabbitmq_place.queue)
        until(lambda: exists(rabbitmq_place))
        job.send()
        app.wait_for("succeeded", "succeeded")


def exists(place: RabbitmqPlace) -> bool:
    channel = place.connection.channel()
    try:
        channel.queue_declare(place.queue, passive=True)
    except pika.exceptions.ChannelClosedByBroker:
        return False
    channel.close()
    return True


def test_a_tag_is_used_once(rabbitmq_place: RabbitmqPlace, caplog: pytest.LogCaptureFixture) -> None:
    consumer, message = taken(rabbitmq_place.app())
    consumer.transport.ack(message)
    consumer.transport.ack(message)
    assert caplog.text.count(f"Message {message.message_id} is already acknowledged.") == 1
    consumer.close()
    assert rabbitmq_place.left() == []


class Refusing:
    def basic_publish(self, *args: Any, **kwargs: Any) -> None:
        raise pika.exceptions.UnroutableError([])


def test_a_message_whose_retry_and_dead_letter_no_queue_takes_is_redelivered(
    rabbitmq_place: RabbitmqPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dramatiq_policies.delivery.publishing._RETRY_REFUSAL_FOR", 0.05)
    monkeypatch.setattr("dramatiq_policies.delivery.publishing._RETRY_PAUSES", (0.0, 0.05))
    app = rabbitmq_place.app()

    @app.actor(retry_on={Transient: RetryPolicy(attempts=2, wait=constant(10))})
    def job() -> None:
        raise Transient

    message = job.send()
    with monkeypatch.context() as patch:
        patch.setattr(ConfirmedPublisher, "_channel", lambda transport: Refusing())
        with app.working():
            app.wait_for("interrupted")
    assert [(event.outcome, event.reason) for event in app.events][:1] == [("interrupted", "handoff_failed")]
    assert [left.message_id for left in rabbitmq_place.left()] == [message.message_id]


def test_a_consumer_whose_connection_breaks_while_it_is_closed_is_closed(
    rabbitmq_place: RabbitmqPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer, _ = taken(rabbitmq_place.app())
    stock = consumer.transport.inner.connection.close

    def break_off() -> None:
        stock()
        raise pika.exceptions.ConnectionWrongStateError("it is closing")

    monkeypatch.setattr(consumer.transport.inner, "close", lambda: None)
    monkeypatch.setattr(consumer.transport.inner.connection, "close", break_off)
    consumer.close()
    assert consumer.transport.is_revoked()
