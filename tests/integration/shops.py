"""An application with an outbox: a real database, a real broker."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import dramatiq
import sqlalchemy as sa
from dramatiq import Message
from sqlalchemy.orm import Session

from dramatiq_policies import install
from dramatiq_policies.sql import SqlOutbox

from .places import Place


class Shop:
    """A broker with an outbox, and actors that note what they got.

    Parameters:
      url: The broker's, if not the place's.
      options: The outbox's. A commit waits for its publication, however busy the machine is.
    """

    def __init__(self, place: Place, engine: Any, url: str | None = None, **options: Any) -> None:
        self.place = place
        self.engine = engine
        self.broker = place.broker(url)
        self.outbox = SqlOutbox(engine, **{"namespace": place.queue[-12:], "wait": 20_000, **options})
        install(self.broker, outbox=self.outbox)
        self.actor: Any = functools.partial(dramatiq.actor, broker=self.broker, queue_name=place.queue)
        self.done: list[Any] = []
        self.confirm = self.actor(self.done.append, actor_name="confirm")
        # The queues, before the broker goes away.
        self.broker.declare_queue(place.queue, **({"ensure": True} if place.kind == "rabbitmq" else {}))

    @contextlib.contextmanager
    def order(self) -> Iterator[Session]:
        """A transaction with a block of the outbox."""
        with Session(self.engine) as session, session.begin(), self.outbox.within(session):
            yield session

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
        return self.outbox.database.run(self.outbox.table.stats).pending

    def rows(self) -> list[Any]:
        return self.outbox.database.run(self.outbox.table.list)

    def make_due(self) -> None:
        """The leases of all rows end: their process has died long ago."""
        table = sa.text("UPDATE dramatiq_policies_outbox SET due_at = 0, owner = 'dead' WHERE namespace = :namespace")
        self.outbox.database.run(
            lambda connection: connection.connection.execute(table, {"namespace": self.outbox.namespace})
        )

    def left(self) -> list[Any]:
        """The arguments of what lies in the queue, which is empty afterwards on RabbitMQ."""
        return sorted(message.args[0] for message in self.place.left())

    def messages(self) -> list[Message[Any]]:
        return self.place.left()
