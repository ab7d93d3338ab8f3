"""An application with an outbox: a real database, a real broker."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import dramatiq
from dramatiq import Message, Worker
from sqlalchemy.orm import Session

from dramatiq_policies import install
from dramatiq_policies.sql import SqlOutbox
from dramatiq_policies.transactions.outbox import Outbox
from dramatiq_policies.transactions.outbox_table import MESSAGE, NewRow

from .places import Place


class AnyShop:
    """A broker with an outbox, and an actor that notes what it got.

    Parameters:
      url: The broker's, if not the place's.
    """

    def __init__(self, place: Place, outbox: Outbox, url: str | None = None) -> None:
        self.place = place
        self.broker = place.broker(url)
        self.outbox = outbox
        install(self.broker, outbox=outbox)
        self.done: list[Any] = []
        self.confirm: Any = dramatiq.actor(
            self.done.append, broker=self.broker, queue_name=place.queue, actor_name="confirm"
        )
        # The queues, before the broker goes away.
        self.broker.declare_queue(place.queue, **({"ensure": True} if place.kind == "rabbitmq" else {}))

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        worker = Worker(self.broker, worker_timeout=100, worker_threads=1)
        worker.start()
        try:
            yield
        finally:
            worker.stop()

    @contextlib.contextmanager
    def relaying(self, count: int = 1) -> Iterator[list[threading.Thread]]:
        """Relays in threads."""
        stop = threading.Event()
        threads = [threading.Thread(target=self.outbox.run_relay, args=(stop,)) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            yield threads
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def pending(self) -> int:
        return self.outbox.database.run(self.outbox.rows.stats).pending

    def rows(self) -> list[Any]:
        return self.outbox.database.run(self.outbox.rows.list)

    def insert(self, body: bytes, kind: str = MESSAGE) -> None:
        """Insert a row that is due."""
        row = NewRow(kind, "of this test", "confirm", self.place.queue, body)
        self.outbox.database.run(lambda connection: self.outbox.table.insert(connection, row, "", due=True))

    def left(self) -> list[Any]:
        """The arguments of what lies in the queue, which is empty afterwards on RabbitMQ."""
        return sorted(message.args[0] for message in self.place.left())

    def messages(self) -> list[Message[Any]]:
        return self.place.left()


class Shop(AnyShop):
    """A shop with SQLAlchemy.

    Parameters:
      options: The outbox's. A commit waits for its publication, however busy the machine is.
    """

    outbox: SqlOutbox

    def __init__(self, place: Place, engine: Any, url: str | None = None, **options: Any) -> None:
        self.engine = engine
        outbox = SqlOutbox(engine, **{"namespace": place.queue[-12:], "wait": 20_000, **options})
        super().__init__(place, outbox, url)

    @contextlib.contextmanager
    def order(self) -> Iterator[Session]:
        """A transaction with a block of the outbox."""
        with Session(self.engine) as session, session.begin(), self.outbox.within(session):
            yield session
