"""Transactional jobs whose message comes back to the same process, because the ack or the message was lost."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dramatiq
import pytest
import sqlalchemy as sa
from dramatiq import Worker

from dramatiq_policies import ErrorClassifier, Idempotency, current_job, install
from dramatiq_policies.sql import SqlOutbox, SqlStore
from tests.proxy import Proxy, amqp_method

from .databases import with_driver
from .places import Place, RabbitmqPlace, RedisPlace, until

pytestmark = pytest.mark.usefixtures("quick_restarts")


class Shop:
    """A worker with one transactional job, which waits for ``gate`` when it runs for the first time."""

    def __init__(self, place: Place, url: str, database: str) -> None:
        self.place = place
        self.engine = sa.create_engine(with_driver(database))
        with self.engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE IF EXISTS paid")
            connection.exec_driver_sql("CREATE TABLE paid (number INT NOT NULL)")
        self.events: list[Any] = []
        self.broker = place.broker(url)
        self.store = SqlStore(self.engine, namespace=place.queue)
        self.idempotency = Idempotency(self.store)
        install(
            self.broker,
            error_classifier=ErrorClassifier(on_outcome=self.events.append),
            idempotency=self.idempotency,
            outbox=SqlOutbox(self.engine, namespace=place.queue[-12:]),
        )
        self.runs: Counter[str] = Counter()
        self.begun, self.gate = threading.Event(), threading.Event()

        @dramatiq.actor(broker=self.broker, queue_name=place.queue, idempotency_key="{order}", transactional=True)
        def pay(order: int) -> None:
            self.runs["pay"] += 1
            self.begun.set()
            assert self.gate.wait(30)
            current_job().session.execute(sa.text("INSERT INTO paid (number) VALUES (:number)"), {"number": order})
            receipt.send(order)

        @dramatiq.actor(broker=self.broker, queue_name=place.queue, idempotent=True)
        def receipt(order: int) -> None:
            self.runs["receipt"] += 1

        self.pay: Any = pay

    @contextmanager
    def paying(self) -> Iterator[None]:
        """Work, and wait until the job runs."""
        self.pay.send(7)
        self.worker = worker = Worker(self.broker, worker_timeout=30, worker_threads=1)
        worker.start()
        try:
            assert self.begun.wait(30)
            yield
        finally:
            self.gate.set()
            worker.stop(10_000)
            self.engine.dispose()

    def take_over(self, **changes: Any) -> Any:
        """Give the key to another process. Returns a function that ends the other process."""
        (claim,) = self.idempotency.claims.leases._held.values()
        theirs = claim.record._replace(owner="elsewhere:1:place:1", token="1", **changes).encode()
        assert self.store.swap(claim.name, claim.value, theirs, 10**9) is None
        return lambda: self.store.swap(claim.name, theirs, None, 1)

    def outcomes(self) -> list[tuple[str, str | None]]:
        return [(event.outcome.value, event.reason) for event in self.events if event.actor == "pay"]

    def wait_for(self, *outcomes: tuple[str, str | None]) -> None:
        until(lambda: self.outcomes() == list(outcomes), 60, lambda: (self.outcomes(), self.runs))

    def paid(self) -> list[int]:
        with self.engine.connect() as connection:
            return list(connection.execute(sa.text("SELECT number FROM paid")).scalars())


@pytest.fixture
def proxy(place: Place) -> Iterator[Proxy]:
    with Proxy.before(place.url) as proxy:
        yield proxy


@pytest.fixture
def shop(place: Place, proxy: Proxy, database_url: str) -> Shop:
    return Shop(place, proxy.url, database_url)


def lose_the_message(shop: Shop, proxy: Proxy) -> Any:
    """Take the running job's message away from its worker. Returns a function that redelivers the message after the run."""
    place = shop.place
    if isinstance(place, RabbitmqPlace):
        proxy.refuse()
        proxy.cut()
        return proxy.accept
    assert isinstance(place, RedisPlace)
    # As another worker does when this one was silent for its heartbeat_timeout.
    acks = place.key(f"__acks__.{shop.broker.broker_id}.{place.queue}")
    (redis_id,) = place.client.smembers(acks)
    place.client.srem(acks, redis_id)

    def redeliver() -> None:
        until(lambda: not shop.worker.work_queue.unfinished_tasks)
        place.client.rpush(place.key(place.queue), redis_id)

    return redeliver


def test_a_committed_run_whose_message_comes_back_to_the_same_process_is_a_duplicate(shop, proxy):
    with shop.paying():
        redeliver = lose_the_message(shop, proxy)
        shop.gate.set()
        until(lambda: shop.paid() == [7])
        redeliver()
        until(lambda: ("duplicate", "completed") in shop.outcomes(), 60, shop.outcomes)
        until(lambda: shop.runs["receipt"])
    assert shop.runs == {"pay": 1, "receipt": 1}
    assert shop.paid() == [7]


def test_a_committed_run_whose_ack_is_lost_on_its_way_is_a_duplicate(
    rabbitmq_place: RabbitmqPlace, database_url: str
) -> None:
    with Proxy.before(rabbitmq_place.url) as proxy:
        shop = Shop(rabbitmq_place, proxy.url, database_url)
        with shop.paying():
            lost = proxy.cut_when(amqp_method(60, 80))
            shop.gate.set()
            assert lost.wait(20)
            shop.wait_for(("succeeded", None), ("duplicate", "completed"))
            until(lambda: shop.runs["receipt"])
        assert shop.runs == {"pay": 1, "receipt": 1}
        assert shop.paid() == [7]


def test_a_run_that_gave_way_to_another_process_runs_again_if_the_other_process_dies(shop, proxy):
    with shop.paying():
        redeliver = lose_the_message(shop, proxy)
        end_the_other_process = shop.take_over()
        shop.gate.set()
        until(shop.outcomes)
        # Where RabbitMQ has closed the connection, nobody can settle the message.
        assert shop.outcomes()[0] in {("duplicate", "stale"), ("interrupted", "handoff_failed")}
        assert shop.paid() == []
        end_the_other_process()
        redeliver()
        until(lambda: ("succeeded", None) in shop.outcomes(), 60, shop.outcomes)
        until(lambda: shop.runs["receipt"])
    assert shop.runs == {"pay": 2, "receipt": 1}
    assert shop.paid() == [7]


def test_a_run_that_gave_way_to_another_message_runs_again_if_the_other_fails(place: Place, database_url: str) -> None:
    shop = Shop(place, place.url, database_url)
    with shop.paying():
        end_the_other_run = shop.take_over(message_id="another")
        shop.gate.set()
        until(shop.outcomes)
        assert shop.outcomes()[0] == ("duplicate", "stale")
        assert shop.paid() == []
        end_the_other_run()
        until(lambda: ("succeeded", None) in shop.outcomes(), 60, shop.outcomes)
        until(lambda: shop.runs["receipt"])
    assert shop.runs == {"pay": 2, "receipt": 1}
    assert shop.paid() == [7]
