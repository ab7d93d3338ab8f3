"""Letting one job run while nothing else runs in this process.

A process that is killed takes every job in it along, and the store only knows that all of them began and never ended. So
the last start that a job is granted is made alone: if the process dies of that one, the job is the killer, and those
that merely ran beside it get through theirs.
"""

from __future__ import annotations

from threading import Condition
from typing import Any

__all__ = ["Solitude"]

#: How long, in seconds, the job waits for others to end; then it begins beside them.
_OTHERS_MAY_TAKE = 10.0
#: How long, in seconds, others wait before they begin beside it.
_ALONE_AT_MOST = 30.0


class Solitude:
    """Who runs in this process, and who wants to do so alone.

    Attributes:
      running: The deliveries whose jobs run.
    """

    def __init__(self) -> None:
        self.running: set[Any] = set()
        self._alone: Any = None
        self._changed = Condition()

    @property
    def is_open(self) -> bool:
        """Whether nobody is to be left alone now."""
        return self._alone is None

    # On every job's way, so without the lock: who enters is seen first and looks then, who wants to be alone says so first
    # and looks then. So one of the two sees the other.

    def enter(self, delivery: Any) -> None:
        """Begin, once nobody is to be left alone."""
        self.running.add(delivery)
        if self._alone is not None:
            with self._changed:
                self.running.discard(delivery)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._alone is None, _ALONE_AT_MOST)
                self.running.add(delivery)

    def leave(self, delivery: Any) -> None:
        self.running.discard(delivery)
        if self._alone is not None:
            with self._changed:
                if self._alone is delivery:
                    self._alone = None
                self._changed.notify_all()

    def make_alone(self, delivery: Any) -> None:
        """Wait until this delivery, which has entered, runs alone, and keep others out until it leaves."""
        with self._changed:
            self.running.discard(delivery)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._alone is None, _ALONE_AT_MOST)
            self._alone = delivery
            self._changed.wait_for(lambda: not self.running, _OTHERS_MAY_TAKE)
            self.running.add(delivery)
