"""Let one job run alone in this process.

When a process is killed, all jobs in the process die, and the store only knows: all of them began and never ended. So the
last allowed start of a job is made alone. If the process dies again, the job is the killer. Jobs that only ran beside the
killer survive their own last start. A crash of a start beside other jobs proves nothing. So before another job joins a job
running alone, the store must record the end of running alone.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Condition
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..delivery.delivery import Delivery

__all__ = ["ExclusiveRuns"]

#: How long, in seconds, the job waits for the end of other jobs.
_WAIT_FOR_OTHERS = 10.0
#: How long, in seconds, other jobs wait while a job runs alone. The time doubles with each start that proved nothing.
_ALONE_FOR = 30.0
#: The upper bound of the doubled time, in seconds.
_MAX_ALONE_FOR = 600.0
#: Seconds before the next try to record in the store that a job no longer runs alone.
_RECORD_AGAIN_AFTER = 1.0


class ExclusiveRuns:
    """The running jobs of this process, and the job that must run alone.

    Parameters:
      record_beside: Records in the store that a delivery's job no longer runs alone; returns False if the store is down.

    Attributes:
      running: The deliveries whose jobs run.
    """

    def __init__(self, record_beside: Callable[[Delivery], bool] = lambda delivery: True) -> None:
        self.running: set[Delivery] = set()
        self._record_beside = record_beside
        self._alone: Delivery | None = None
        #: Until when, in monotonic seconds, other jobs wait for the job that runs alone. None while the job itself waits for
        #: the others to end.
        self._alone_until: float | None = None
        self._changed = Condition()

    @property
    def is_open(self) -> bool:
        """Whether no job runs alone or waits to run alone."""
        return self._alone is None

    # Lock-free, because every job passes here. Both sides publish, then check: at least one sees the other (Dekker).

    def enter(self, delivery: Delivery) -> None:
        """Begin a job, after waiting for a job running alone."""
        self.running.add(delivery)
        while self._alone is not None:
            self._wait_outside(delivery)

    def _wait_outside(self, delivery: Delivery) -> None:
        """Wait while a job runs alone. After the job's time alone is over, record this in the store, and begin."""
        with self._changed:
            self.running.discard(delivery)
            self._changed.notify_all()
            alone = self._alone
            while alone is not None and self._alone is alone:
                left = None if self._alone_until is None else self._alone_until - monotonic()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
            if alone is None or self._alone is not alone:
                self.running.add(delivery)
                return
        # Outside the lock: the store may be slow.
        recorded = self._record_beside(alone)
        with self._changed:
            if self._alone is alone:
                if recorded:
                    self._alone = None
                else:
                    self._alone_until = monotonic() + _RECORD_AGAIN_AFTER
                self._changed.notify_all()
            self.running.add(delivery)

    def leave(self, delivery: Delivery) -> None:
        self.running.discard(delivery)
        if self._alone is not None:
            with self._changed:
                if self._alone is delivery:
                    self._alone = None
                self._changed.notify_all()

    def make_alone(self, delivery: Delivery, unproven: int = 0) -> bool:
        """Wait until the job of a delivery, already entered, runs alone, and keep other jobs out until the job leaves.

        Other jobs stay out for 30 s, at most ten minutes: the time doubles with each start that proved nothing
        (``unproven``). If a job waits for longer, the store records the end of running alone, and all jobs begin.

        Returns:
          Whether the job runs alone. False if other jobs did not end within ten seconds; no job stays out then.
        """
        with self._changed:
            self.running.discard(delivery)
            self._changed.notify_all()
            ends = monotonic() + _WAIT_FOR_OTHERS
            alone = self._changed.wait_for(lambda: self._alone is None, _WAIT_FOR_OTHERS)
            if alone:
                self._alone, self._alone_until = delivery, None
                alone = self._changed.wait_for(lambda: not self.running, max(0.0, ends - monotonic()))
                if alone:
                    at_most = min(_ALONE_FOR * 2 ** min(unproven, 10), _MAX_ALONE_FOR)
                    self._alone_until = monotonic() + at_most
                else:
                    self._alone = None
            self.running.add(delivery)
            self._changed.notify_all()
            return alone
