"""A thread that sleeps until the next deadline.

A setter publishes a deadline for ``fire_due``, and then reads ``wakes_at``. The thread sets ``wakes_at`` to
infinity, calls ``fire_due``, and then sets ``wakes_at`` to the earliest deadline. Writing and reading a deadline take the same
lock. So either the thread sees the new deadline, or the setter sees a later ``wakes_at`` and wakes the thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from math import inf
from threading import Lock
from time import monotonic

from ..common.safe_logger import SafeLogger

__all__ = ["Timer"]

logger = SafeLogger("dramatiq_policies.interrupts")


class Timer:
    """A daemon thread that calls a function when a deadline is due.

    Parameters:
      fire_due: Handles the deadlines that are due, and returns the next one, by ``time.monotonic()``.
    """

    def __init__(self, fire_due: Callable[[], float]) -> None:
        self.fire_due = fire_due
        self.thread: threading.Thread | None = None
        #: When the thread will wake. After setting an earlier deadline, call `wake`.
        self.wakes_at = inf
        self._starting = Lock()
        self._stopped = False
        # Released by `wake`, acquired again by the thread.
        self._wakeup = Lock()
        self._wakeup.acquire()

    def start(self) -> bool:
        """Start the thread, once; return False if no thread could be started."""
        with self._starting:
            if self.thread is None:
                thread = threading.Thread(target=self._run, name="dramatiq-policies-timer", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # No more threads, or the process is ending.
                    logger.exception(
                        "The timer of the timeouts could not start: no timeout is enforced. Restart the worker."
                    )
                else:
                    self.thread = thread
            return self.thread is not None

    def stop(self) -> None:
        self._stopped = True
        self.wake()

    def wake(self) -> None:
        try:
            self._wakeup.release()
        except RuntimeError:
            pass  # Another thread has just called it.

    def _run(self) -> None:
        while not self._stopped:
            self.wakes_at = inf
            try:
                earliest = self.fire_due()
            except Exception:
                logger.exception("The timer of the timeouts raised an error; it continues in a second.")
                earliest = monotonic() + 1
            self.wakes_at = earliest
            if earliest == inf:
                self._wakeup.acquire()
            else:
                self._wakeup.acquire(timeout=min(max(0.0, earliest - monotonic()), threading.TIMEOUT_MAX))
