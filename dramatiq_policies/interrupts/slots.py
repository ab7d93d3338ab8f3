"""One slot for each worker thread: which job runs there, and how it is interrupted or reported as stuck.

`interrupts` says why no interrupt comes too late.
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

from ..common.safe_logger import SafeLogger
from ..errors import TimeoutExceeded

__all__ = ["Slot", "Target", "Tokens", "Watch", "frame_of", "report_apart", "supported"]

logger = SafeLogger("dramatiq_policies.interrupts")

#: Sets an exception in a thread, by its identifier and the exception's class.
_set_exception: Callable[[int, Any], int] | None
try:
    _set_exception = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_ulong, ctypes.py_object)(
        ("PyThreadState_SetAsyncExc", ctypes.pythonapi)
    )
except AttributeError:  # PyPy, and whoever drops it
    _set_exception = None


class _Drained(BaseException):
    """Set and raised in place of an interrupt that came too late."""


class Watch(Protocol):
    """Who is told of a job that goes on after its interrupt.

    Attributes:
      grace: How long after the deadline, in seconds.
    """

    grace: float

    def stuck(self, job: Any, stack: str) -> object:
        """Called once for the run, on a thread of its own, with what `call` was given as ``job`` and its stack."""


class Target(Protocol):
    """A job that is not interrupted by raising in its worker thread."""

    def interrupt(self, exception: type[BaseException]) -> None:
        """See to it that ``exception`` ends the job. Must not wait for anything."""

    def stack(self) -> str:
        """Where the job is."""


#: The interrupts of one call that nobody has used yet, by their classes. Taken by ``pop(…, None)``.
Tokens = dict[type[BaseException], bool]


class Slot:
    """What runs on one worker thread.

    Its thread writes it when a job begins, under the lock, and the timer while it goes on, under the lock. When the job
    ends, only ``tokens`` and ``job`` are unset, without the lock.

    Attributes:
      tokens: Those of the call that goes on, and its identity; None between jobs.
      due: When the timer must look at it again, by the monotonic clock.
      timed_out: Whether its deadline was seen to.
    """

    __slots__ = ("due", "job", "lock", "target", "thread_id", "timed_out", "tokens", "watch")

    def __init__(self, thread_id: int) -> None:
        self.thread_id = thread_id
        self.lock = Lock()
        self.tokens: Tokens | None = None
        self.due = inf
        self.timed_out = False
        self.watch: Watch | None = None
        self.job: Any = None
        self.target: Target | None = None

    def interrupt(self, tokens: Tokens, exception: type[BaseException]) -> None:
        """Raise it in the job whose tokens these are, unless that has ended or has had it. The lock is held."""
        if tokens.pop(exception, None) is None:
            return
        if self.target is not None:
            self.target.interrupt(exception)
        elif _set_exception is not None:
            _set_exception(self.thread_id, exception)

    def attend(self) -> float:
        """Do what is due, and say when the next thing is. Only the timer calls it."""
        with self.lock:
            if self.due > monotonic():
                # If that job has ended, too: the next one would wake the timer, only to end before it has looked.
                return self.due
            tokens = self.tokens
            if tokens is None:
                return inf
            watch = self.watch
            if not self.timed_out:
                self.interrupt(tokens, TimeoutExceeded)
                self.timed_out = True
                self.due = inf if watch is None else self.due + watch.grace
                return self.due
            self.due = inf
            job = self.job
        assert watch is not None  # Without one nothing was due any more.
        report_apart(lambda: self.report(tokens, watch, job))
        return inf

    def report(self, tokens: Tokens, watch: Watch, job: Any) -> None:
        """Say that a job is stuck, unless it has ended."""
        target = self.target
        stack = "".join(format_stack(frame_of(self.thread_id))) if target is None else target.stack()
        if self.tokens is tokens:
            watch.stuck(job, stack)

    def disarm(self, tokens: Tokens) -> None:
        """Let the job be interrupted no more, and leave nothing pending.

        May be cut short by an interrupt, and done again.
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
    """Whether threads can be interrupted here; says so once in a process where they can't."""
    if _set_exception is None:
        _say_unsupported()
    return _set_exception is not None


@cache
def _say_unsupported() -> None:
    logger.warning(
        "Timeouts and shutdowns can't interrupt jobs on this platform (%s): only async actors are cancelled, other jobs "
        "that run past their timeout are reported.",
        sys.implementation.name,
    )


def frame_of(thread_id: int) -> FrameType | None:
    """What a thread executes; None if it has ended."""
    return sys._current_frames().get(thread_id)  # noqa: SLF001 - documented in spite of its name


def report_apart(report: Callable[[], object]) -> None:
    # What is told (logs, the network, code of the user's) must not hold up the other jobs' deadlines.
    def guarded() -> None:
        try:
            report()
        except Exception:
            logger.exception("A stuck job could not be reported.")

    try:
        threading.Thread(target=guarded, name="dramatiq_policies.stuck", daemon=True).start()
    except RuntimeError:
        guarded()
