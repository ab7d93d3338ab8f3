"""A broker that takes a message in no form stops no other message."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pika
import pytest
import redis
from dramatiq import Message
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.common import xq_name

from dramatiq_policies import Heartbeat, RetryPolicy, constant
from dramatiq_policies._redis import CommandBatcher
from dramatiq_policies.brokers.rabbitmq.publisher import ConfirmedPublisher
from dramatiq_policies.delivery import publishing, returned

from .places import App, Place, RabbitmqPlace, RedisPlace, until

pytestmark = pytest.mark.usefixtures("quick_restarts", "impatient")


class Transient(Exception):
    pass


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "_RETRY_REFUSAL_FOR", 0.3)
    monkeypatch.setattr(returned, "_FIRST_RETURN", 300)


class FullDeadLetters(RabbitmqBroker):
    """Its dead-letter queues hold one message and refuse the next, as an operator's policy may have it."""

    def _declare_xq_queue(self, queue_name: str) -> Any:
        arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
        return self.channel.queue_declare(queue=xq_name(queue_name), durable=True, arguments=arguments)


@pytest.fixture
def full(rabbitmq_place: RabbitmqPlace) -> App:
    app = rabbitmq_place.app(broker=FullDeadLetters(url=rabbitmq_place.url))
    app.broker.declare_queue(rabbitmq_place.queue, ensure=True)
    rabbitmq_place.channel.basic_publish("", f"{rabbitmq_place.queue}.XQ", b"the one that fills it")
    until(lambda: depth(rabbitmq_place, ".XQ") == 1)
    return app


def depth(place: RabbitmqPlace, suffix: str) -> int:
    return place.channel.queue_declare(place.queue + suffix, passive=True).method.message_count


def test_dead_jobs_that_the_dead_letter_queue_refuses_stop_no_healthy_job(
    full: App, rabbitmq_place: RabbitmqPlace, caplog: pytest.LogCaptureFixture
) -> None:
    ran = []

    @full.actor(max_retries=0)
    def bad(n: int) -> None:
        ran.append(n)
        raise Transient

    @full.actor()
    def good() -> None:
        pass

    for n in range(6):
        bad.send(n)
    with full.working(threads=1):  # Two slots.
        until(lambda: full.outcomes.count("interrupted") == 6)
        for _ in range(5):
            good.send()
        until(lambda: full.outcomes.count("succeeded") == 5)
        assert {event.reason for event in full.events if event.outcome == "interrupted"} == {"handoff_failed"}
        critical = [record for record in caplog.records if record.levelname == "CRITICAL"]
        assert len(critical) == 1
        assert "make room in the dead-letter queue" in critical[0].getMessage()
        # Somebody makes room: each becomes a dead letter, and none has run again.
        until(lambda: rabbitmq_place.dead_bodies() and full.outcomes.count("dead") == 6)
    assert sorted(ran) == list(range(6))
    filler, *bodies = rabbitmq_place.dead_bodies()
    assert filler == b"the one that fills it"
    letters = [Message.decode(body) for body in bodies]
    assert sorted(letter.args[0] for letter in letters) == list(range(6))
    assert {letter.options["failure"]["exception"].rpartition(".")[2] for letter in letters} == {"Transient"}
    assert rabbitmq_place.left() == []


def test_bodies_that_cannot_be_read_and_that_the_dead_letter_queue_refuses_stop_no_healthy_job(
    full: App, rabbitmq_place: RabbitmqPlace
) -> None:
    ran = []

    @full.actor()
    def good(n: int) -> None:
        ran.append(n)

    rabbitmq_place.push(*(b"{ %d" % n for n in range(4)))
    with full.working(threads=1):
        for n in range(5):
            good.send(n)
        until(lambda: len(ran) == 5)
        until(lambda: rabbitmq_place.dead_bodies() and full.outcomes.count("dead") == 4)
    filler, *found = rabbitmq_place.dead_bodies()
    assert (filler, sorted(found)) == (b"the one that fills it", [b"{ %d" % n for n in range(4)])
    # The consumer was not made anew: nothing ran twice.
    assert ran == list(range(5))
    assert rabbitmq_place.left() == []


class TooLarge:
    """A channel on which the server refuses permanently what is larger than the message was."""

    def __init__(self, channel: Any, most: Callable[[], int], sizes: list[int]) -> None:
        self.channel, self.most, self.sizes = channel, most, sizes

    def basic_publish(self, exchange: str, queue: str, body: bytes, *args: Any, **kwargs: Any) -> Any:
        self.sizes.append(len(body))
        if len(body) > self.most():
            raise pika.exceptions.ChannelClosedByBroker(406, "PRECONDITION_FAILED - message size is larger")
        return self.channel.basic_publish(exchange, queue, body, *args, **kwargs)


def test_a_message_whose_retry_is_larger_than_the_server_takes_is_dead_as_received(
    rabbitmq_place: RabbitmqPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, sizes = rabbitmq_place.app(), []

    @app.actor(retry_on={Transient: RetryPolicy(attempts=3, wait=constant(10))})
    def job() -> None:
        raise Transient

    message = job.message()
    body = message.encode()
    stock = ConfirmedPublisher._channel
    monkeypatch.setattr(
        ConfirmedPublisher, "_channel", lambda self: TooLarge(stock(self), lambda: len(body) + 40, sizes)
    )
    app.broker.enqueue(message)
    app.work_until("dead")
    assert app.events[0].reason == "handoff_failed"
    (letter,) = rabbitmq_place.dead_bodies()
    assert Message.decode(letter).message_id == message.message_id
    assert b"failure" not in letter
    # Each form was tried once: the retry, the dead letter, a small one, the body.
    assert sizes[0] > sizes[-1]
    assert len(sizes) == 4
    assert rabbitmq_place.left() == []


def test_a_heartbeat_stops_while_refused_messages_occupy_every_slot(
    rabbitmq_place: RabbitmqPlace, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    app = rabbitmq_place.app()
    heartbeat = Heartbeat(tmp_path / "beat")
    app.broker.add_middleware(heartbeat)
    refusing = threading.Event()
    refusing.set()
    stock = ConfirmedPublisher.publish

    def publish(self: Any, *args: Any) -> None:
        if refusing.is_set():
            raise pika.exceptions.NackError([])
        stock(self, *args)

    monkeypatch.setattr(ConfirmedPublisher, "publish", publish)
    monkeypatch.setattr(returned, "_FIRST_RETURN", 1_500)

    @app.actor(max_retries=0)
    def bad() -> None:
        raise Transient

    for _ in range(2):
        bad.send()
    with app.working(threads=1):
        until(lambda: app.outcomes == ["interrupted"] * 2)
        assert not heartbeat.well()
        refusing.clear()
        began = time.monotonic()
        until(lambda: app.outcomes.count("dead") == 2)
        assert time.monotonic() - began < 20
        until(heartbeat.well)
    assert len(rabbitmq_place.dead()) == 2
    assert rabbitmq_place.left() == []


def test_a_redis_that_is_full_is_waited_for_and_logged_once(
    redis_place: RedisPlace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = redis_place.app()
    full = threading.Event()
    full.set()
    tried = []
    stock = CommandBatcher.call

    def call(self: Any, *command: Any, **kwargs: Any) -> Any:
        if full.is_set() and b"policies" in command[-1]:
            tried.append(1)
            raise redis.exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")
        return stock(self, *command, **kwargs)

    monkeypatch.setattr(CommandBatcher, "call", call)

    @app.actor(retry_on={Transient: RetryPolicy(attempts=2, wait=constant(10))})
    def job() -> None:
        raise Transient

    job.send()
    with app.working():
        # For longer than a refusal is tried: this one is of no single message.
        until(lambda: len(tried) > 4)
        assert app.outcomes == []
        full.clear()
        app.wait_for("retried", "dead")
    assert app.outcomes == ["retried", "dead"]
    assert caplog.text.count("Redis accepts no writes") == 1
    assert redis_place.left() == []


def test_a_message_that_can_be_decoded_and_not_encoded_is_dead_after_one_run(place: Place) -> None:
    """Nested so deep that the consumer's stack has room to decode it, and a job's deeper stack none to encode it."""
    app, runs = place.app(), Counter[int]()

    @app.actor(retry_on={Transient: RetryPolicy(attempts=2, wait=constant(10))})
    def job(depth: int, nested: Any) -> None:
        runs[depth] += 1
        raise Transient

    @app.actor()
    def good() -> None:
        pass

    good.send()
    depths = range(sys.getrecursionlimit() - 60, sys.getrecursionlimit() - 15)
    for depth in depths:
        # A readable one after each: some are too deep for the consumer, too.
        nested = b"[" * depth + b"]" * depth
        place.push(job.message(depth, "nested").encode().replace(b'"nested"', nested), good.message().encode())
    with app.working():
        until(lambda: app.outcomes.count("dead") == len(depths), describe=lambda: app.outcomes)
        until(lambda: app.outcomes.count("succeeded") == len(depths) + 1)
    assert set(runs.values()) <= {1, 2}
    assert len(place.dead_bodies()) == len(depths)
    reasons = {event.reason for event in app.events if event.outcome == "dead"}
    assert reasons <= {"exhausted", "handoff_failed", "malformed"}
