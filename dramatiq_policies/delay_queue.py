"""The delayed messages that a consumer has in hand."""

from __future__ import annotations

from queue import Empty, PriorityQueue
from typing import Any

from . import _dramatiq

__all__ = ["DelayQueue"]


class DelayQueue(PriorityQueue[Any]):
    """Dramatiq's queue of delayed messages in hand, except that only we take messages out of it.

    Dramatiq's consumer thread puts messages in and a worker's ``join`` waits on it, as ever; but it would move the due
    ones without knowing whether the broker took them, and drop them all when a connection is lost.
    """

    def get_nowait(self) -> Any:
        raise Empty

    def due(self, now: int) -> Any | None:
        """The next message whose time has come, or None."""
        # Without its lock, which gevent's has not: only the consumer's own thread puts in and takes out.
        if not self.queue or _dramatiq.eta_of(self.queue[0]) > now:
            return None
        return self.take()

    def take(self) -> Any | None:
        try:
            return self.get(block=False)
        except Empty:
            return None
