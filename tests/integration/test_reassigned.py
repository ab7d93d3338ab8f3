"""A broker that gives a message to another worker while its job still runs here.

Redis does so when a worker was silent for too long, RabbitMQ as soon as a connection is lost. The job has a key, so the
other copy waits; what follows from the run must then be published here or come of the other copy: once, and never not at all.
"""

from __future__ import annotations

import pytest
from dramatiq import pipeline

from dramatiq_policies import Idempotency, RetryPolicy, constant
from dramatiq_policies.brokers.ended_runs import EndedRuns
from dramatiq_policies.delivery.broker_state import state_of
from dramatiq_policies.stores import IdempotencyStore
from dramatiq_policies.stores.memory import MemoryStore
from tests.proxy import Proxy

from .places import App, Gate, Place, RabbitmqPlace, RedisPlace, until
from .test_publish_before_acknowledge import calm

pytestmark = pytest.mark.usefixtures("quick_restarts")


class Transient(Exception):
    pass


class Permanent(Exception):
    pass


class Shop:
    """A job that stops at a gate in its first run, declared in any number of apps."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.effects: list[str] = []

    def app(self, place: Place, store: IdempotencyStore | None, url: str | None = None) -> App:
        app = place.app(url, idempotency=Idempotency(store, lease=2_000))
        guarded = {"idempotency_key": "{number}"}

        @app.actor(retry_on={Transient: RetryPolicy(attempts=3, wait=constant(50))}, **guarded)
        def fails(number):
            if not self.gate.entered.is_set():
                self.gate()
                raise Transient
            self.effects.append("fails")

        @app.actor(max_retries=0, **guarded)
        def dies(number):
            if not self.gate.entered.is_set():
                self.gate()
            raise Permanent

        @app.actor(**guarded)
        def first(number):
            self.effects.append("first")
            if not self.gate.entered.is_set():
                self.gate()
            return number

        @app.actor(idempotent=True)
        def second(number):
            self.effects.append("second")

        return app


def send(app: App, job: str) -> None:
    actors = app.broker.actors
    if job == "first":
        pipeline([actors["first"].message(7), actors["second"].message()], broker=app.broker).run()
    else:
        actors[job].send(7)


JOBS = pytest.mark.parametrize(
    ("job", "effects", "letters"), [("fails", ["fails"], 0), ("dies", [], 1), ("first", ["first", "second"], 0)]
)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["store beside the broker", "store elsewhere"])
@JOBS
def test_the_follow_up_of_a_job_whose_message_redis_reassigned_comes_once(
    redis_place: RedisPlace,
    monkeypatch: pytest.MonkeyPatch,
    job: str,
    effects: list[str],
    letters: int,
    elsewhere: bool,
) -> None:
    monkeypatch.setattr("dramatiq.worker.QUEUE_PREFETCH", 1)  # a worker with a job takes no other message
    store = MemoryStore() if elsewhere else None
    shop = Shop()
    app, other = shop.app(redis_place, store), shop.app(redis_place, store)
    send(app, job)
    with app.working(threads=1):
        assert shop.gate.entered.wait(10)
        # As the recovery of any worker does with what a silent one holds.
        (acks,) = redis_place.client.scan_iter(match=redis_place.key(f"__acks__.*.{redis_place.queue}"), count=5_000)
        (redis_id,) = redis_place.client.smembers(acks)
        assert redis_place.client.srem(acks, redis_id)
        redis_place.client.rpush(redis_place.key(redis_place.queue), redis_id)
        with other.working(threads=1):
            other.wait_for("deferred")
            shop.gate.open.set()
            until(lambda: shop.effects == effects and len(redis_place.dead()) == letters, 5, lambda: shop.effects)
            bodies = [redis_place.key(f"{name}.msgs") for name in (redis_place.queue, f"{redis_place.queue}.DQ")]
            until(lambda: not redis_place.client.exists(*bodies), 5)
    assert shop.effects == effects
    assert len(redis_place.dead()) == letters
    assert redis_place.left() == []


@JOBS
def test_the_follow_up_of_a_job_whose_connection_to_rabbitmq_was_lost_comes_once(
    rabbitmq_place: RabbitmqPlace, job: str, effects: list[str], letters: int
) -> None:
    shop = Shop()
    with Proxy.before(rabbitmq_place.url) as proxy:
        app = shop.app(rabbitmq_place, MemoryStore(), proxy.url)
        send(app, job)
        with app.working(threads=2) as worker:
            assert shop.gate.entered.wait(10)
            consumer = worker.consumers[rabbitmq_place.queue].consumer
            proxy.cut()
            until(consumer.transport.is_revoked)
            # It has come again, and waits for the end of the run.
            until(lambda: state_of(app.broker).shared(EndedRuns)._waiting)
            shop.gate.open.set()
            until(lambda: shop.effects == effects and len(rabbitmq_place.dead()) == letters, 5, lambda: shop.effects)
            calm(app, 1.0)
        app.broker.close()
    assert shop.effects == effects
    assert len(rabbitmq_place.dead()) == letters
    assert rabbitmq_place.left() == []
