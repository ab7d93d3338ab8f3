"""Browse and move messages on a StubBroker, for tests and demos. Workers must not run meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty
from typing import Any

from dramatiq import Message
from dramatiq.brokers.stub import StubBroker

from ...delivery.direct import enqueue_directly
from ..browser import Item

__all__ = ["browse"]


@contextmanager
def browse(broker: StubBroker, queue: str, *, dead: bool) -> Iterator[StubBrowser]:
    """Open the dead letters of a queue, or its ready messages."""
    browser = StubBrowser(broker, queue, dead=dead)
    try:
        yield browser
    finally:
        browser.requeue_rest()


class StubBrowser:
    """The dead letters, or the ready messages, of one queue."""

    def __init__(self, broker: StubBroker, queue: str, *, dead: bool) -> None:
        self.broker = broker
        self.queue: Any = broker.queues[queue] if queue in broker.queues or not dead else None
        self.dead_letters = broker.dead_letters_by_queue[queue] if dead else None
        self.items = [Item(dead_letter.encode(), None, dead_letter) for dead_letter in self.dead_letters or ()]
        if not dead:
            self._take_all()
        self.size = len(self.items)

    def _take_all(self) -> None:
        while True:
            try:
                self.items.append(Item(self.queue.get_nowait(), None, object()))
            except Empty:
                return

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Item]:
        yield from list(self.items)

    def read_all(self) -> Iterator[Item]:
        return iter(self)

    def send(self, item: Item, message: Message[Any]) -> bool:
        # At once, as on a server: the item goes at once, too, and a rollback would lose the message.
        enqueue_directly(self.broker, message)
        return self.drop(item)

    def drop(self, item: Item) -> bool:
        self.items = [other for other in self.items if other.place is not item.place]
        if self.dead_letters is None:
            self.queue.task_done()
        else:
            self.dead_letters[:] = [dead_letter for dead_letter in self.dead_letters if dead_letter is not item.place]
        return True

    def requeue_rest(self) -> None:
        """Requeue the remaining ready messages."""
        if self.dead_letters is None:
            for item in self.items:
                self.queue.put(item.body)
                self.queue.task_done()

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)
