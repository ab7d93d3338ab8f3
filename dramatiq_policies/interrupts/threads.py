"""Run a job on a worker thread and interrupt the job, but nothing else, at its deadline or at shutdown.

Why no interrupt leaves `run`
-----------------------------

**The right to interrupt.** Each run makes a dict of tokens: a token for the deadline, and a token for a shutdown if the job
asked for notifications. To interrupt, the timer (or `shutdown`) holds the slot's lock, takes the token out of the dict, and
calls ``PyThreadState_SetAsyncExc``. When the job has ended, the worker thread takes out the remaining tokens. ``dict.pop``
is atomic: under the GIL because ``pop`` is C code and classes hash and compare by identity, on a free-threaded build
because ``pop`` holds the dict's lock. So each token has exactly one taker, and nobody can use a token taken by the worker.
Each run has a separate dict: the interrupting thread keeps the slot's lock from its first look until the exception is set,
and the next run on that thread needs the same lock to begin.

**Pending exceptions.** If the worker got all tokens back, no exception was set and none can be set later. This is the usual
case, and costs nothing more. Otherwise another thread took a token. The worker then waits until the slot's lock is free:
the taker of a token got the lock before the dict was empty, so every exception is set by then. The worker then sets another
exception, `_Drained`, and loops until `_Drained` is raised. A thread state has room for only one exception, so `_Drained`
replaces an exception set and not yet raised. The replacement is atomic against delivery: under the GIL because the thread
itself does both, on a free-threaded build because both exchange the field atomically. (Setting NULL would empty the field,
too. But CPython before 3.13 then leaves the eval-breaker flag set: all threads run slower until the next such exception,
and on 3.11 a traced thread never goes on.)

**Exceptions raised meanwhile.** Until then an interrupt can be raised between any two instructions of `run` itself. Each
interrupt has used up a token, and a run has at most two. So the way out is written three times, each in a handler of the
one before: two interrupts can cut short two of them, and the third leaves nothing behind. Repeating the way out is
harmless. The worker thread takes no lock on its way out, so an interrupt can't leave a lock held. On its way in, the worker
holds the slot's lock only until the run is visible, and interrupting needs the same lock.

**The outcome.** A result or an error from before the interrupt stands: the job has ended, and the interrupt is dropped. A
job has timed out only if the exception was raised in the job. So each job has exactly one outcome.

**The right thread.** The system may give the identifier of a thread that has ended to a new thread. The taker of a token
holds the slot's lock until the exception is set, and the worker does not leave `run` before the lock is free. So the
interrupted thread is alive and in the same run.

The timer
---------

A daemon thread of the process looks at the slots of all worker threads. The timer has no queue of deadlines: early ends of
jobs would leave stale entries. The timer sleeps until the earliest deadline. A worker writes the deadline into its slot,
and the timer reads the deadline, both under the slot's lock; `timer` explains why the timer misses no deadline. A deadline
no earlier than the timer's next wake-up costs no wake-up. The timer keeps the deadline of an ended job, so that the next
job's deadline is no earlier; after that, an idle process sleeps without end.

The timer starts at the first deadline, hence after the fork. A forked child starts with no slots: in the child, nobody
interrupts a job that was running in the parent at the fork.

A run inside a run on the same thread (a job calls another actor) belongs to the outer run and has the outer deadline.
`shutdown` does not interrupt jobs that begin later, as with Dramatiq's own ``ShutdownNotifications``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from math import inf
from threading import Lock, get_ident
from typing import Any, TypeVar

from dramatiq.middleware import Shutdown
from dramatiq.threading import Interrupt

from ..common.connections import is_async_exception
from ..common.current import Job
from ..errors import TimeoutExceeded
from .slots import Slot, StuckListener, Target, Tokens, noop, supported
from .timer import Timer

__all__ = ["arm", "end_timer", "reset", "run", "shutdown", "slot_of_this_thread", "timer_runs", "unwrap_interrupt"]

R = TypeVar("R")


class _OfThisThread(threading.local):
    slot: Slot | None = None


def _fire_due() -> float:
    return min([slot.fire_due() for slot in _slots.copy().values()], default=inf)


_slots: dict[int, Slot] = {}
_of_this_thread = _OfThisThread()
_timer = Timer(_fire_due)


def run(
    fn: Callable[..., R],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    deadline: float | None = None,
    on_shutdown: bool = False,
    stuck_listener: StuckListener | None = None,
    job: Job | None = None,
    after_interrupt: Callable[[], object] = noop,
) -> R:
    """Run ``fn(*args, **kwargs)`` on this thread, and interrupt the call at the deadline or at shutdown.

    Parameters:
      deadline: When to raise `TimeoutExceeded` in ``fn``, by ``time.monotonic()``; None for never.
      on_shutdown: Whether `shutdown` raises Dramatiq's ``Shutdown`` in ``fn``.
      stuck_listener: Called if ``fn`` still runs when ``stuck_listener.grace`` seconds have passed since the deadline; None for no report.
      job: Passed to ``stuck_listener``.
      after_interrupt: Called on this thread after an interrupt, once no other can come: drop connections that the interrupt
        may have broken. Must not raise. Also called if ``fn`` ended by an interrupt of other code (dramatiq-abort).

    Returns the result of ``fn`` and raises its error, an interrupt included. No interrupt is raised after that. An interrupt
    after the end of ``fn`` is dropped.
    """
    if deadline is None and not on_shutdown:
        return _run_without_limits(fn, args, kwargs, after_interrupt)
    due = inf if deadline is None else deadline
    slot = _of_this_thread.slot or slot_of_this_thread()
    if slot.tokens is not None:
        return fn(*args, **kwargs)
    tokens: Tokens = {TimeoutExceeded: True, Shutdown: True} if on_shutdown else {TimeoutExceeded: True}
    returned = interrupted = False
    error: BaseException | None = None
    try:
        try:
            try:
                with slot.lock:
                    slot.tokens = tokens
                    slot.due = due
                    slot.timed_out = False
                    slot.stuck_listener = stuck_listener
                    slot.job = job
                    slot.target = None
                if due < _timer.wakes_at:
                    _timer.wake()
                result = fn(*args, **kwargs)
                returned = True
            except BaseException as raised:
                error = raised
            slot.tokens = slot.job = None
            if tokens.pop(TimeoutExceeded, None) is None or (on_shutdown and tokens.pop(Shutdown, None) is None):
                interrupted = True
                slot.disarm(tokens)
        except BaseException as late:  # The first interrupt, a line too late: see the module's docstring.
            interrupted = True
            if not returned and error is None:
                error = late
            slot.disarm(tokens)
    except BaseException as later:  # The second interrupt.
        interrupted = True
        if not returned and error is None:
            error = later
        slot.disarm(tokens)
    if interrupted or (error is not None and is_async_exception(error)):
        after_interrupt()
    if error is None:
        return result
    try:
        # Not `error.__traceback__`: a user's class may define a property of that name.
        traceback = _TRACEBACK.__get__(error)
        # Raising the error again adds this frame again.
        _TRACEBACK.__set__(error, None if traceback is None else traceback.tb_next)
        raise unwrap_interrupt(error)
    finally:
        # Break the cycle: both refer to this frame.
        del error, traceback


def _run_without_limits(
    fn: Callable[..., R], args: Sequence[Any], kwargs: Mapping[str, Any], after_interrupt: Callable[[], object]
) -> R:
    """Run a job that only other code may interrupt."""
    try:
        return fn(*args, **kwargs)
    except BaseException as error:
        if is_async_exception(error):
            after_interrupt()
        raise


_TRACEBACK: Any = BaseException.__dict__["__traceback__"]


def shutdown() -> None:
    """Raise Dramatiq's ``Shutdown`` in every job on a thread that asked for notifications."""
    for slot in _slots.copy().values():
        with slot.lock:
            if slot.tokens is not None:
                slot.interrupt(slot.tokens, Shutdown)


def reset() -> None:
    """End the timer's thread; the next job starts another. For tests, while no job runs."""
    _timer.stop()
    _forget_slots()


def timer_runs() -> bool:
    """Return whether the timer's thread runs."""
    return _timer.thread is not None


def end_timer() -> None:
    """End and join the timer's thread, unless a job with a deadline runs. The next job starts another thread."""
    thread = _timer.thread
    if thread is None or any(slot.tokens is not None for slot in _slots.copy().values()):
        return
    _timer.stop()
    _forget_slots()
    thread.join()


def slot_of_this_thread() -> Slot:
    slot = _of_this_thread.slot
    if slot is None:
        supported()
        slot = Slot(get_ident())
        if _timer.start():
            # Replaces the slot of a dead thread whose identifier was reused.
            _slots[slot.thread_id] = _of_this_thread.slot = slot
    return slot


def arm(
    slot: Slot,
    tokens: Tokens,
    target: Target,
    *,
    due: float,
    stuck_listener: StuckListener | None,
    job: Job | None,
) -> None:
    """Write a job into the slot, with interrupts going to ``target``. `run` does the same inline for jobs on this thread."""
    with slot.lock:
        slot.tokens = tokens
        slot.due = due
        slot.timed_out = False
        slot.stuck_listener = stuck_listener
        slot.job = job
        slot.target = target
    if due < _timer.wakes_at:
        _timer.wake()


def unwrap_interrupt(error: BaseException) -> BaseException:
    """Return the interrupt if Dramatiq replaced an interrupt by this error; else the error itself."""
    # Dramatiq raises this if a sync job waits for a coroutine, and the coroutine ends over a second after an interrupt.
    if type(error) is RuntimeError and isinstance(error.__cause__, Interrupt):
        return error.__cause__
    return error


def _forget_slots() -> None:
    global _slots, _of_this_thread, _timer  # noqa: PLW0603 - an object around them would cost each job two more look-ups
    _slots = {}
    _of_this_thread = _OfThisThread()
    _timer = Timer(_fire_due)


def _after_fork_in_child() -> None:
    for slot in _slots.values():
        # A thread of the parent may have held the lock, and the forked job reads the lock at its end.
        slot.lock = Lock()
    _forget_slots()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
