"""Which connections to Redis are used for what: none is held for ever that others need, none is shared with code of a job's."""

from __future__ import annotations

import time

import pytest
import redis
from dramatiq.brokers.redis import RedisBroker

from dramatiq_policies import Idempotency, RetryPolicy, TimeoutExceeded, constant, current_job
from dramatiq_policies.outcomes import Outcome
from dramatiq_policies.stores.redis import RedisStore

from .places import RedisPlace, until


def pool_of_one(url: str) -> redis.BlockingConnectionPool:
    return redis.BlockingConnectionPool.from_url(url, max_connections=1, timeout=20)


def limited_to_one(url: str) -> redis.ConnectionPool:
    """One that does not wait: whoever asks for a second connection gets an error."""
    return redis.ConnectionPool.from_url(url, max_connections=1)


@pytest.mark.parametrize("keyed", [False, True])
def test_a_pool_of_one_connection_starves_no_thread(redis_place: RedisPlace, keyed: bool) -> None:
    client = redis.Redis(connection_pool=pool_of_one(redis_place.url))
    store = RedisStore(redis.Redis(connection_pool=pool_of_one(redis_place.url)), namespace=f"{redis_place.queue}:idem")
    broker = RedisBroker(client=client, namespace=redis_place.namespace)
    app = redis_place.app(broker=broker, idempotency=Idempotency(store))

    @app.actor(idempotent=keyed, retry_on={OSError: RetryPolicy(attempts=2, wait=constant(20))})
    def job(number: int) -> None:
        if number % 5 == 0 and current_job().attempt == 1:
            raise OSError(number)

    for number in range(20):
        job.send(number)
    with app.working(threads=4):
        until(lambda: app.outcomes.count("succeeded") == 20, 15, lambda: app.outcomes)
    assert redis_place.left() == []


def test_the_shared_line_takes_none_of_the_connections_that_a_pool_may_have(redis_url: str) -> None:
    client = redis.Redis(connection_pool=limited_to_one(redis_url))
    store = RedisStore(client, namespace="dramatiq_policies:test_connections")
    try:
        store.put("key", b"value", 10_000)
        assert client.ping()
        assert store.get("key").value == b"value"
        assert store.delete("key")
    finally:
        client.close()


QUESTIONS = {
    "state": lambda store, asked: Idempotency.state(asked, 1),
    "forget": lambda store, asked: Idempotency.forget(asked, 1),
    "the store": lambda store, asked: (store.put("\0own", b"value", 1_000), store.swap("\0own", None, b"other", 1_000)),
}


@pytest.mark.untraced
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_timeout_in_a_job_that_asks_the_store_reaches_none_of_its_neighbours(
    redis_place: RedisPlace, question: str, caplog: pytest.LogCaptureFixture
) -> None:
    namespace = f"{redis_place.namespace}:idem"
    store = RedisStore.from_url(redis_place.url, namespace=namespace)
    app = redis_place.app(idempotency=Idempotency(store))
    ask = QUESTIONS[question]

    @app.actor(idempotency_key="{number}")
    def asked(number: int) -> None: ...

    @app.actor(timeout=30, discard_on=TimeoutExceeded)
    def curious() -> None:
        # An interrupt that comes in a destructor is lost: then it ends by itself.
        end = time.monotonic() + 2
        while time.monotonic() < end:
            ask(store, asked)

    @app.actor(idempotent=True)
    def neighbour(number: int) -> None:
        time.sleep(0.001)

    for number in range(400):
        neighbour.send(number)
        if number % 10 == 0:
            curious.send()
    with app.working(threads=4):
        until(lambda: len(app.events) >= 440, 60, lambda: app.outcomes)
    neighbours = [event.outcome for event in app.events if event.actor == "neighbour"]
    assert neighbours == [Outcome.SUCCEEDED] * 400
    assert app.outcomes.count("discarded") > 20
    assert "can't be reached" not in caplog.text
    # The reply to an interrupted command is not the reply to a later command.
    assert [store.get(f"none {number}").value for number in range(20)] == [None] * 20
