"""The delayed messages that a consumer has in hand."""

from __future__ import annotations

from queue import Empty, PriorityQueue
from typing import Any

from .. import _dramatiq

__all__ = ["DelayQueue"]


class DelayQueue(PriorityQueue[Any]):
    """Dramatiq's queue of delayed messages in hand, except that only we take messages out of it.

    Dramatiq's consumer thread puts messages in and a worker's ``join`` waits on it, as ever; but it would move the due
    ones without knowing whether the broker took them, and drop them all when a connection is lost.

    Only the consumer's own thread puts in and takes out, so the methods below take no lock (gevent's queue has none).
    """

    def get_nowait(self) -> Any:
        raise Empty

    def next_eta(self) -> float | None:
        """When the nearest message is due, in milliseconds since the epoch; None if the queue is empty."""
        return _dramatiq.eta_of(self.queue[0]) if self.queue else None

    def due(self, now: float, limit: int) -> list[Any]:
        """Take at most ``limit`` messages whose time has come. Call ``task_done`` for each."""
        items: list[Any] = []
        while self.queue and len(items) < limit and _dramatiq.eta_of(self.queue[0]) <= now:
            items.append(self.take())
        return items

    def take(self) -> Any | None:
        try:
            return self.get(block=False)
        except Empty:
            return None

    def cut(self, keep: int) -> list[Any]:
        """Take all but the ``keep`` nearest messages. Call ``task_done`` for each."""
        self.queue.sort(key=_dramatiq.eta_of)  # A sorted list is a heap.
        far = self.queue[keep:]
        del self.queue[keep:]
        return far
