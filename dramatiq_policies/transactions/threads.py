"""A few threads call the database for all threads of a process: connections and waits are bounded.

A driver may wait forever, for a hanging server or a lost packet. The calling thread waits here instead, and gives up in time. An
interrupt of a job strikes this wait and never the driver.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from weakref import finalize

from ..common.forks import after_fork

__all__ = ["Call", "DatabaseThreads", "NoAnswer"]

T = TypeVar("T")


class NoAnswer(TimeoutError):
    """The database has not answered in time. The statement may be carried out later."""


class Call:
    """A call for one of the threads."""

    def __init__(self, work: Callable[[Call], Any]) -> None:
        self._work = work
        self._lock = threading.Lock()
        # A lock, not an Event: cheaper, and an interrupt in `Event.wait` may leave the Event locked.
        self._latch = threading.Lock()
        self._latch.acquire()
        self._answers: list[Any] = []
        self._error: BaseException | None = None
        self._sever: Callable[[], object] | None = None
        self._abandoned = False

    def run(self) -> None:
        if not self._abandoned:
            try:
                self._answers.append(self._work(self))
            except BaseException as error:
                self._error = error
        self._latch.release()

    def severed_by(self, sever: Callable[[], object] | None) -> None:
        """Set the function to end the driver's wait. Another thread calls the function when the caller gives up."""
        with self._lock:
            self._sever = sever
            if self._abandoned and sever is not None:
                sever()

    def wait(self, deadline: float) -> Any:
        """Return the answer, or raise the error of ``work``.

        Raises:
          NoAnswer: There is none by ``deadline`` of ``time.monotonic()``.
        """
        if not self._latch.acquire(timeout=max(0.0, deadline - time.monotonic())):
            with self._lock:
                self._abandoned = True
                if self._sever is not None:
                    self._sever()
            raise NoAnswer("the database has not answered in time")
        if self._error is not None:
            try:
                raise self._error
            finally:
                # The traceback holds this frame.
                self._error = None
        return self._answers[0]


class DatabaseThreads:
    """At most ``limit`` daemon threads, started when a call needs one. Fork-safe.

    Parameters:
      name: The name of the threads.
      limit: The number of simultaneous calls; other calls wait.
    """

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self.limit = limit
        self._end: finalize[Any, Any] | None = None
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        """Start without threads: a child has no threads of the parent."""
        if self._end is not None:
            self._end.detach()
        self._lock = threading.Lock()
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._started = 0
        self._end = finalize(self, self._calls.put, None)
        self._end.atexit = False

    def call(self, work: Callable[[Call], T], deadline: float) -> T:
        """Run ``work`` in a thread, and return its answer by ``deadline`` of ``time.monotonic()``.

        Raises:
          NoAnswer: There is no answer in time, or no thread was free in time.
        """
        call = Call(work)
        self._calls.put(call)
        if not self._idle.acquire(blocking=False):
            self._start_thread()
        answer: T = call.wait(deadline)
        return answer

    def _start_thread(self) -> None:
        with self._lock:
            if self._started < self.limit:
                thread = threading.Thread(target=_serve, args=(self._calls, self._idle), name=self.name, daemon=True)
                thread.start()
                self._started += 1

    def close(self) -> None:
        """Let the threads end after the running calls. The next call starts new threads."""
        self._calls.put(None)
        self.reset_after_fork()


def _serve(calls: SimpleQueue[Call | None], idle: threading.Semaphore) -> None:
    while True:
        try:
            call = calls.get_nowait()
        except Empty:
            idle.release()
            call = calls.get()
        if call is None:
            # The others end too.
            calls.put(None)
            return
        call.run()
        # A thread that waits must not hold the last answer.
        del call
