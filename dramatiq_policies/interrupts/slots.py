"""Slots: the job of each worker thread, with ways to interrupt or report the job.

`threads` explains why no interrupt comes too late.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from functools import cache
from math import inf
from threading import Lock
from time import monotonic, sleep
from traceback import format_stack
from types import FrameType
from typing import Any, Protocol

from ..common.current import Job
from ..common.safe_logger import SafeLogger
from ..errors import TimeoutExceeded

__all__ = ["Slot", "StuckListener", "Target", "Tokens", "frame_of", "noop", "report_on_thread", "supported"]

logger = SafeLogger("dramatiq_policies.interrupts")

#: Sets an exception in a thread, by its identifier and the exception's class.
_set_exception: Callable[[int, Any], int] | None
try:
    _set_exception = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_ulong, ctypes.py_object)(
        ("PyThreadState_SetAsyncExc", ctypes.pythonapi)
    )
except AttributeError:  # PyPy
    _set_exception = None


class _Drained(BaseException):
    """Replaces an interrupt that came too late."""


def noop() -> None:
    """Do nothing."""


class StuckListener(Protocol):
    """Receives reports of jobs still running after an interrupt.

    Attributes:
      grace: Time between deadline and report, in seconds.
    """

    grace: float

    def stuck(self, job: Job | None, stack: str) -> object:
        """Called at most once per run, on a separate thread, with the ``job`` and stack of the run."""


class Target(Protocol):
    """A job interrupted in another way than by an exception in the worker thread."""

    def interrupt(self, exception: type[BaseException]) -> None:
        """End the job by ``exception``. Must not block."""

    def stack(self) -> str:
        """Format the job's current stack."""


#: The unused interrupts of a run, by class. Taken by ``pop(…, None)``.
Tokens = dict[type[BaseException], bool]


class Slot:
    """The job of one worker thread.

    The worker thread writes the slot when a job begins, and the timer writes it during the job, both under the lock. When
    the job ends, the worker thread unsets only ``tokens`` and ``job``, without the lock.

    Attributes:
      tokens: The unused interrupts of the current run; the dict also identifies the run. None between jobs.
      due: When the timer must look at the slot again, by the monotonic clock.
      timed_out: Whether the timer has handled the deadline.
    """

    __slots__ = ("due", "job", "lock", "stuck_listener", "target", "thread_id", "timed_out", "tokens")

    def __init__(self, thread_id: int) -> None:
        self.thread_id = thread_id
        self.lock = Lock()
        self.tokens: Tokens | None = None
        self.due = inf
        self.timed_out = False
        self.stuck_listener: StuckListener | None = None
        self.job: Job | None = None
        self.target: Target | None = None

    def interrupt(self, tokens: Tokens, exception: type[BaseException]) -> None:
        """Interrupt the job of ``tokens``, at most once and never after the end. The caller holds the lock."""
        if tokens.pop(exception, None) is None:
            return
        if self.target is not None:
            self.target.interrupt(exception)
        elif _set_exception is not None:
            _set_exception(self.thread_id, exception)

    def fire_due(self) -> float:
        """Interrupt or report the job if due; return when to look again. Only the timer calls this."""
        with self.lock:
            if self.due > monotonic():
                # Also for a job that has ended: otherwise the next job would have to wake the timer.
                return self.due
            tokens = self.tokens
            if tokens is None:
                return inf
            stuck_listener = self.stuck_listener
            if not self.timed_out:
                self.interrupt(tokens, TimeoutExceeded)
                self.timed_out = True
                self.due = inf if stuck_listener is None else self.due + stuck_listener.grace
                return self.due
            self.due = inf
            job = self.job
        assert stuck_listener is not None  # Otherwise `due` was infinite.
        report_on_thread(lambda: self.report(tokens, stuck_listener, job))
        return inf

    def report(self, tokens: Tokens, stuck_listener: StuckListener, job: Job | None) -> None:
        """Report the job as stuck, unless the job has ended."""
        target = self.target
        stack = "".join(format_stack(frame_of(self.thread_id))) if target is None else target.stack()
        if self.tokens is tokens:
            stuck_listener.stuck(job, stack)

    def disarm(self, tokens: Tokens) -> None:
        """End all interrupts of the job, and leave none pending.

        An interrupt may cut this short; a second call is safe.
        """
        self.tokens = self.job = None
        tokens.clear()
        if self.target is None and _set_exception is not None:
            while self.lock.locked():
                sleep(0.0001)
            while True:
                try:
                    _set_exception(self.thread_id, _Drained)
                    for _ in range(100):
                        pass
                except _Drained:
                    return


def supported() -> bool:
    """Return whether this interpreter can interrupt threads; if not, log a warning once per process."""
    if _set_exception is None:
        _log_unsupported()
    return _set_exception is not None


@cache
def _log_unsupported() -> None:
    logger.warning(
        "Timeouts and shutdowns can't interrupt jobs on this platform (%s): they cancel async actors "
        "only. Other jobs past their timeout are reported as stuck.",
        sys.implementation.name,
    )


def frame_of(thread_id: int) -> FrameType | None:
    """Return the current frame of a thread; None if the thread has ended."""
    return sys._current_frames().get(thread_id)  # noqa: SLF001 - documented in spite of its name


def report_on_thread(report: Callable[[], object]) -> None:
    """Call ``report`` on a thread of its own: logging and user code must not delay the deadlines of other jobs."""

    def guarded() -> None:
        try:
            report()
        except Exception:
            logger.exception("A stuck job could not be reported.")

    try:
        threading.Thread(target=guarded, name="dramatiq-policies-stuck", daemon=True).start()
    except RuntimeError:
        guarded()
