"""A thread that sleeps until something is due.

Whoever sets a time writes it down for ``attend`` to find, and then reads when the thread will wake; the thread first says
that everybody is to wake it, then attends, and then says when it will wake. If writing and finding take the same lock,
either the thread sees the new time, or whoever has set it sees that it must wake the thread.
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
    """A daemon thread that does things when they are due.

    Parameters:
      attend: Does what is due, and says when the next thing is, by ``time.monotonic()``.
    """

    def __init__(self, attend: Callable[[], float]) -> None:
        self.attend = attend
        self.thread: threading.Thread | None = None
        #: When the thread will attend again; who has something that is due earlier must `wake` it.
        self.wakes_at = inf
        self._starting = Lock()
        self._stopped = False
        # Held but for the moment between a wake-up and its notice.
        self._bell = Lock()
        self._bell.acquire()

    def start(self) -> bool:
        """Start the thread unless it runs; whether it does."""
        with self._starting:
            if self.thread is None:
                thread = threading.Thread(target=self._run, name="dramatiq_policies.timer", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # No more threads, or the process is ending.
                    logger.exception("No timeout is in force: the timer could not be started.")
                else:
                    self.thread = thread
            return self.thread is not None

    def stop(self) -> None:
        self._stopped = True
        self.wake()

    def wake(self) -> None:
        try:
            self._bell.release()
        except RuntimeError:
            pass  # Somebody else has just done so.

    def _run(self) -> None:
        while not self._stopped:
            self.wakes_at = inf
            try:
                earliest = self.attend()
            except Exception:
                logger.exception("The timer of the timeouts failed; it goes on in a second.")
                earliest = monotonic() + 1
            self.wakes_at = earliest
            if earliest == inf:
                self._bell.acquire()
            else:
                self._bell.acquire(timeout=min(max(0.0, earliest - monotonic()), threading.TIMEOUT_MAX))
