"""The delayed messages that a consumer has in hand."""

from __future__ import annotations

from dataclasses import dataclass
from queue import Empty, PriorityQueue
from typing import Any

from dramatiq import Message
from dramatiq.broker import MessageProxy

from .. import _dramatiq
from .validation import is_number

__all__ = ["DelayQueue", "Move"]


class DelayQueue(PriorityQueue[Any]):
    """The delayed messages in hand. Dramatiq puts messages in, and only dramatiq_policies takes messages out.

    Dramatiq's consumer thread puts messages in, and a worker's ``join`` waits for the queue to be empty. Dramatiq would move
    due messages without a confirmation of the broker, and drop all messages when a connection is lost.

    Only the consumer's own thread puts in and takes out, so the methods below take no lock (gevent's queue has none).
    """

    def get_nowait(self) -> _dramatiq.DelayItem:
        raise Empty

    def next_eta(self) -> float | None:
        """When the nearest message is due, in milliseconds since the epoch; None if the queue is empty."""
        return _dramatiq.eta_of(self.queue[0]) if self.queue else None

    def due(self, now: float, limit: int) -> list[_dramatiq.DelayItem]:
        """Take at most ``limit`` messages whose time has come. Call ``task_done`` for each."""
        items: list[_dramatiq.DelayItem] = []
        while self.queue and len(items) < limit and _dramatiq.eta_of(self.queue[0]) <= now:
            items.append(self.take())
        return items

    def take(self) -> _dramatiq.DelayItem | None:
        try:
            return self.get(block=False)
        except Empty:
            return None

    def cut(self, keep: int) -> list[_dramatiq.DelayItem]:
        """Take all but the ``keep`` nearest messages. Call ``task_done`` for each."""
        self.queue.sort(key=_dramatiq.eta_of)  # A sorted list is a heap.
        far = self.queue[keep:]
        del self.queue[keep:]
        return far


@dataclass(slots=True)
class Move:
    """The move of one due message from the delay queue to the work queue.

    Parameters:
      item: The item of the `DelayQueue`.
      message: The message as delivered by the delay queue.
      moved: The copy for the work queue.
      done: Whether the work queue has the message, and the delay queue no longer.
      error: Why this message could not be moved. The rest of the batch is not affected.
    """

    item: _dramatiq.DelayItem
    message: MessageProxy
    moved: Message[Any]
    done: bool = False
    error: Exception | None = None

    @classmethod
    def of(cls, item: _dramatiq.DelayItem, queue_name: str) -> Move:
        message = _dramatiq.delayed_message(item)
        moved = message.copy(queue_name=queue_name)
        eta = moved.options.pop("eta", None)
        if "ready_at" not in moved.options and is_number(eta) and eta > 0:
            moved.options["ready_at"] = int(eta)
        return cls(item, message, moved)
