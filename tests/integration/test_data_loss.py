"""Messages that Redis no longer has when their jobs end: lost with the data of Redis, or given to another worker.

The tests empty their namespace only: the server is shared.
"""

from __future__ import annotations

import logging
import threading
import time

import pytest

from dramatiq_policies import Idempotency, RetryPolicy, constant
from dramatiq_policies.brokers.redis.settle_script import SettleScript

from .places import Gate, RedisPlace, until

pytestmark = pytest.mark.usefixtures("quick_restarts")


def losses(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.ERROR and "no longer has" in record.getMessage()
    ]


def empty(place: RedisPlace) -> None:
    place.client.delete(*place.client.scan_iter(match=place.key("*"), count=10_000))


class Job:
    """A job that waits for its gate, declared with some options."""

    def __init__(self, place: RedisPlace, **options: object) -> None:
        self.app = place.app(idempotency=Idempotency(lease=2_000))
        self.begun = threading.Semaphore(0)
        self.gate = threading.Event()

        @self.app.actor(**options)
        def work(number):
            self.begun.release()
            assert self.gate.wait(20)
            if options.get("retry_on"):
                raise ValueError(number)

        self.send = work.send

    def begin(self, count: int) -> None:
        for number in range(count):
            self.send(number)
        for _ in range(count):
            assert self.begun.acquire(timeout=20)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"idempotency_key": "{number}"},
        {"retry_on": {ValueError: RetryPolicy(attempts=3, wait=constant(50))}},
        {"discard_on": (ValueError,), "retry_on": {KeyError: RetryPolicy(attempts=2)}},
    ],
    ids=["plain", "keyed", "retried", "discarded"],
)
def test_messages_of_an_emptied_redis_are_one_error_with_their_number(
    redis_place: RedisPlace, caplog: pytest.LogCaptureFixture, options: dict[str, object]
) -> None:
    job = Job(redis_place, **options)
    with job.app.working(threads=4):
        job.begin(4)
        empty(redis_place)
        job.gate.set()
        until(lambda: len(job.app.events) >= 4)
        until(lambda: not job.app.in_hand())
    (line,) = losses(caplog)
    assert f"Redis no longer has 4 messages of queue {redis_place.queue!r}" in line


def test_an_emptied_redis_under_load_is_one_error_a_queue_and_later_messages_are_none(
    redis_place: RedisPlace, caplog: pytest.LogCaptureFixture
) -> None:
    app = redis_place.app(idempotency=Idempotency(lease=2_000))
    ran, emptied = [], threading.Event()

    @app.actor(idempotency_key="{number}")
    def work(number):
        time.sleep(0.005)
        if number >= 1_000:
            assert emptied.wait(30)
        ran.append(number)

    with app.working(threads=8):
        for number in range(2_000):
            work.send(number)
        until(lambda: len(ran) > 50)
        empty(redis_place)
        assert len(ran) < 2_000
        emptied.set()
        until(lambda: losses(caplog))
        for number in range(10_000, 10_100):
            work.send(number)
        until(lambda: sum(number >= 10_000 for number in ran) == 100)
    assert len(losses(caplog)) == 1


def test_a_message_that_another_worker_took_over_and_finished_is_no_loss(
    redis_place: RedisPlace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dramatiq.worker.QUEUE_PREFETCH", 1)
    gate, ran = Gate(), []
    apps = []
    for _ in range(2):
        app = redis_place.app()

        @app.actor
        def work(number):
            ran.append(number)
            if len(ran) == 1:
                gate()

        apps.append((app, work))
    (app, first), (other, _) = apps
    first.send(1)
    with app.working(threads=1):
        assert gate.entered.wait(10)
        (acks,) = redis_place.client.scan_iter(match=redis_place.key(f"__acks__.*.{redis_place.queue}"), count=5_000)
        (redis_id,) = redis_place.client.smembers(acks)
        redis_place.client.srem(acks, redis_id)
        redis_place.client.rpush(redis_place.key(redis_place.queue), redis_id)
        with other.working(threads=1):
            body = redis_place.key(f"{redis_place.queue}.msgs")
            until(lambda: len(ran) == 2 and not redis_place.client.exists(body))
        gate.open.set()
        until(lambda: len(app.events) == 1)
    assert losses(caplog) == []


def test_an_acknowledgement_that_is_sent_twice_is_no_loss(
    redis_place: RedisPlace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a reply that was lost with its connection."""
    job = Job(redis_place)
    settle = SettleScript.run
    again = []

    def twice(self, *args):
        settle(self, *args)
        again.append(settle(self, *args))
        return again[-1]

    monkeypatch.setattr(SettleScript, "run", twice)
    job.gate.set()
    with job.app.working(threads=1):
        job.begin(1)
        until(lambda: again)
    assert again == [0]
    assert losses(caplog) == []


def test_a_body_that_redis_evicted_is_an_error(
    redis_place: RedisPlace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(redis_place)
    info = type(redis_place.client).info
    monkeypatch.setattr(
        type(redis_place.client), "info", lambda self, section: {**info(self, section), "evicted_keys": 7}
    )
    with job.app.working(threads=1):
        job.begin(1)
        redis_place.client.delete(redis_place.key(f"{redis_place.queue}.msgs"))
        job.gate.set()
        until(lambda: losses(caplog))
    (line,) = losses(caplog)
    assert "Redis no longer has 1 message of queue" in line
