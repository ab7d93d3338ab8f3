"""Letting one job run while nothing else runs in this process.

A process that is killed takes every job in it along, and the store only knows that all of them began and never ended. So
the last start that a job is granted is made alone: if the process dies of that one, the job is the killer, and those
that merely ran beside it get through theirs. A start beside others proves nothing, so it is recorded as such: before the
other job begins, not after.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Condition
from time import monotonic
from typing import Any

__all__ = ["ExclusiveRuns"]

#: How long, in seconds, the job waits for others to end.
_OTHERS_MAY_TAKE = 10.0
#: How long, in seconds, others wait while it runs alone. It doubles with each start that proved nothing.
_ALONE_AT_MOST = 30.0
#: The most that this may become.
_ALONE_AT_THE_VERY_MOST = 600.0
#: Pause, in seconds, before the store is asked once more to record that a job is no longer alone.
_EXPOSE_AGAIN = 1.0


class ExclusiveRuns:
    """Who runs in this process, and who wants to do so alone.

    Parameters:
      expose: Records that the start of a delivery's job is no longer one made alone; False if that can't be recorded now.

    Attributes:
      running: The deliveries whose jobs run.
    """

    def __init__(self, expose: Callable[[Any], bool] = lambda delivery: True) -> None:
        self.running: set[Any] = set()
        self._expose = expose
        self._alone: Any = None
        #: Until when, in monotonic seconds, others wait for the one that runs alone. None: it waits for others itself.
        self._until: float | None = None
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
        while self._alone is not None:
            self._wait_outside(delivery)

    def _wait_outside(self, delivery: Any) -> None:
        """Wait while a job is to be left alone; after its time expose it."""
        with self._changed:
            self.running.discard(delivery)
            self._changed.notify_all()
            alone = self._alone
            while alone is not None and self._alone is alone:
                left = None if self._until is None else self._until - monotonic()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
            is_over = alone is not None and self._alone is alone
            if not is_over:
                self.running.add(delivery)
                return
        # Outside the lock: the store may be slow.
        exposed = self._expose(alone)
        with self._changed:
            if self._alone is alone:
                if exposed:
                    self._alone = None
                else:
                    self._until = monotonic() + _EXPOSE_AGAIN
                self._changed.notify_all()
            self.running.add(delivery)

    def leave(self, delivery: Any) -> None:
        self.running.discard(delivery)
        if self._alone is not None:
            with self._changed:
                if self._alone is delivery:
                    self._alone = None
                self._changed.notify_all()

    def make_alone(self, delivery: Any, unproven: int = 0) -> bool:
        """Wait until this delivery, which has entered, runs alone, and keep others out until it leaves.

        Others are kept out for 30 s, twice as long for each of its last starts that were not alone (``unproven``). If
        somebody waits for longer, the start is exposed, and all begin.

        Returns:
          Whether it is alone. It is not if others did not end within ten seconds; then nobody is kept out.
        """
        with self._changed:
            self.running.discard(delivery)
            self._changed.notify_all()
            ends = monotonic() + _OTHERS_MAY_TAKE
            alone = self._changed.wait_for(lambda: self._alone is None, _OTHERS_MAY_TAKE)
            if alone:
                self._alone, self._until = delivery, None
                alone = self._changed.wait_for(lambda: not self.running, max(0.0, ends - monotonic()))
                if alone:
                    at_most = min(_ALONE_AT_MOST * 2 ** min(unproven, 10), _ALONE_AT_THE_VERY_MOST)
                    self._until = monotonic() + at_most
                else:
                    self._alone = None
            self.running.add(delivery)
            self._changed.notify_all()
            return alone
