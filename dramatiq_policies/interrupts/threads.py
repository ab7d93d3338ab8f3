"""Interrupting a job, and nothing but a job.

`call` runs an actor's function on a worker thread, and while it runs, and only then, a deadline or the worker's shutdown
may raise an exception in it. `coroutines` does the same for async actors and `greenlets` under gevent. What runs on each
thread is kept in `slots`; the timer and `shutdown`, which interrupt it there, are here.

Why no interrupt ever leaves `call`
-----------------------------------

**Who may interrupt.** Each call makes a dict of tokens, one for each interrupt it allows: one for its deadline, one for a
shutdown if the job wants to know. To interrupt, the timer (or `shutdown`) takes the token out of the dict and then calls
``PyThreadState_SetAsyncExc``, both while it holds the slot's lock. When the job has ended, the worker thread takes out
what is left. ``dict.pop`` is one step: under the GIL because it is C code that calls back into nothing (classes hash and
compare by identity), on a free-threaded build because it holds the dict's own lock. So every token has exactly one
taker, and a token that the worker has got can never be used. No dict is used for two calls: whoever interrupts holds
the slot's lock from looking which call goes on to the interrupt, and the next call on that thread needs the same lock
to begin.

**What may be pending.** If the worker has got all tokens back, nothing was set and nothing can be set any more. That is
the usual case, and all it costs. If it has not, somebody took one. The worker then waits until the slot's lock is free:
whoever took a token before the dict was empty took the lock before that, so everything that will ever be set has been
set by then. It then sets an exception of its own, `_Drained`, and runs on until that has been raised. A thread state
has room for one exception, so this takes the place of what is set and not yet raised; and that is one step against its
delivery, under the GIL because it is the thread itself that does both, on a free-threaded build because both exchange
the field atomically. (Setting NULL would empty the field, too, but CPython before 3.13 then leaves up the flag that says
"look into it": all threads run slower until the next such exception, and on 3.11 one that is traced never goes on.)

**What may be raised meanwhile.** Until then an interrupt can still be raised between any two instructions of `call`
itself. Each one that is raised has used up a token; there are at most two. The way out is therefore written three
times, each in a handler of the one before it: two interrupts can cut short two of them, and the one that is not cut
short leaves nothing behind that could be raised. Doing it again is harmless. The worker thread takes no lock on its way
out, so an interrupt there can't leave one locked; and on its way in it holds the slot's lock only until the call is
visible, while interrupting takes that same lock.

**What is the outcome.** A result that was returned or an error that was raised before the interrupt arrived stays what
it was: the job has ended, and the interrupt is dropped. A job is timed out only if the exception was raised in it, and
so has exactly one outcome.

**The right thread.** A thread identifier may be given to another thread when its owner has ended. Whoever has taken a
token holds the slot's lock until the exception is set, and the thread does not leave `call` before that lock
is free: the thread that is interrupted is alive and in that very call.

The timer
---------

One daemon thread per process looks at one slot per worker thread; there is no queue of deadlines, in which jobs that end
early would leave stale entries for as long as their timeouts. It sleeps until the earliest deadline. A worker that arms
a deadline writes its slot, and the timer reads it, under the slot's lock: `timer` says why none is overlooked. A deadline
that is no earlier costs no wake-up. One whose job has ended is slept for all the same, so that the next job's is no
earlier; after it an idle process sleeps without end.

It starts at the first deadline, hence after the fork, and a forked child begins anew. In the child nobody will
interrupt a job that was running in the parent when it forked.

A call inside a call on one thread (a job that runs another one by hand) belongs to the outer one and its deadline.
A job that begins after `shutdown` is not interrupted, as with Dramatiq's own ``ShutdownNotifications``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from math import inf
from threading import Lock, get_ident
from typing import Any, Protocol, TypeVar

from dramatiq.middleware import Shutdown
from dramatiq.threading import Interrupt, is_gevent_active

from ..common.connections import is_async_exception
from ..errors import TimeoutExceeded
from .slots import Slot, Target, Tokens, Watch, supported
from .timer import Timer

__all__ = ["Caller", "call", "caller", "end_timer", "reset", "shutdown", "timer_runs"]

R = TypeVar("R")

_gevent_is_active: Callable[[], bool] = is_gevent_active


def nothing() -> None:
    """What is to be done where nothing is."""


class Caller(Protocol):
    """`call`, and what stands in for it."""

    def __call__(
        self,
        fn: Callable[..., R],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        deadline: float | None = None,
        on_shutdown: bool = False,
        watch: Watch | None = None,
        job: Any = None,
        after_interrupt: Callable[[], object] = nothing,
    ) -> R: ...


class _OfThisThread(threading.local):
    slot: Slot | None = None


def _attend() -> float:
    return min([slot.attend() for slot in _slots.copy().values()], default=inf)


_slots: dict[int, Slot] = {}
_mine = _OfThisThread()
_timer = Timer(_attend)


def call(
    fn: Callable[..., R],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    deadline: float | None = None,
    on_shutdown: bool = False,
    watch: Watch | None = None,
    job: Any = None,
    after_interrupt: Callable[[], object] = nothing,
) -> R:
    """Run ``fn(*args, **kwargs)`` on this thread, and interrupt it when it must end.

    Parameters:
      deadline: By ``time.monotonic()``, when `TimeoutExceeded` is raised in it; None for never.
      on_shutdown: Whether `shutdown` raises Dramatiq's ``Shutdown`` in it.
      watch: Who is told if it goes on after the deadline; None for nobody.
      job: What the watch is told that it is.
      after_interrupt: Called, on this thread, if there was an interrupt and once none can come any more, to give up what it
        may have struck in the middle. Must not raise. Also called if ``fn`` ended by an interrupt that others raised.

    Returns what ``fn`` returns and raises what it raises, an interrupt included. No interrupt is raised after that, and
    one that comes when ``fn`` has already ended is dropped.
    """
    if deadline is None and not on_shutdown:
        return fn(*args, **kwargs)
    due = inf if deadline is None else deadline
    slot = _mine.slot or slot_of_this_thread()
    if slot.tokens is not None:
        return fn(*args, **kwargs)
    tokens: Tokens = {TimeoutExceeded: True, Shutdown: True} if on_shutdown else {TimeoutExceeded: True}
    returned = struck = False
    error: BaseException | None = None
    try:
        try:
            try:
                with slot.lock:
                    slot.tokens = tokens
                    slot.due = due
                    slot.timed_out = False
                    slot.watch = watch
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
                struck = True
                slot.disarm(tokens)
        except BaseException as late:  # The first interrupt, one line late: see the module's docstring.
            struck = True
            if not returned and error is None:
                error = late
            slot.disarm(tokens)
    except BaseException as later:  # The second one.
        struck = True
        if not returned and error is None:
            error = later
        slot.disarm(tokens)
    if struck or (error is not None and is_async_exception(error)):
        after_interrupt()
    if error is None:
        return result
    try:
        # Not `error.__traceback__`: a class of the user's may have made a property of it.
        traceback = _TRACEBACK.__get__(error)
        # Raising it anew adds the line of this frame again.
        _TRACEBACK.__set__(error, None if traceback is None else traceback.tb_next)
        raise unwrap_interrupt(error)
    finally:
        # They refer to this frame.
        del error, traceback


_TRACEBACK: Any = BaseException.__dict__["__traceback__"]


def caller(fn: Callable[..., Any]) -> Caller:
    """The `call` for an actor's function: this module's, or the one for async actors, or for gevent."""
    from . import coroutines

    if coroutines.is_async(fn):
        return coroutines.call
    if _gevent_is_active():
        from . import greenlets

        return greenlets.call
    return call


def shutdown() -> None:
    """Raise Dramatiq's ``Shutdown`` in every job that runs now and asked for it."""
    if _gevent_is_active():
        from . import greenlets

        greenlets.shutdown()
    for slot in _slots.copy().values():
        with slot.lock:
            if slot.tokens is not None:
                slot.interrupt(slot.tokens, Shutdown)


def reset() -> None:
    """End the timer's thread; the next job starts another. For tests, and only while no job runs."""
    _timer.stop()
    _begin_anew()


def timer_runs() -> bool:
    """Whether the timer's thread has been started, and not ended."""
    return _timer.thread is not None


def end_timer() -> None:
    """End the timer's thread, and wait until it has; not while a job may be interrupted, and the next one starts another."""
    thread = _timer.thread
    if thread is None or any(slot.tokens is not None for slot in _slots.copy().values()):
        return
    _timer.stop()
    _begin_anew()
    thread.join()


def slot_of_this_thread() -> Slot:
    slot = _mine.slot
    if slot is None:
        supported()
        slot = Slot(get_ident())
        if _timer.start():
            # That of a thread that has ended, and whose identifier this one has, goes.
            _slots[slot.thread_id] = _mine.slot = slot
    return slot


def arm(
    slot: Slot,
    tokens: Tokens,
    target: Target,
    *,
    due: float,
    watch: Watch | None,
    job: Any,
) -> None:
    """Let a job that is not interrupted in this thread be interrupted. `call` does the same in line."""
    with slot.lock:
        slot.tokens = tokens
        slot.due = due
        slot.timed_out = False
        slot.watch = watch
        slot.job = job
        slot.target = target
    if due < _timer.wakes_at:
        _timer.wake()


def unwrap_interrupt(error: BaseException) -> BaseException:
    """The interrupt behind an error, where Dramatiq put another error in its place; else the error."""
    # A coroutine that a sync job waits for, and that takes over a second to end after an interrupt.
    if type(error) is RuntimeError and isinstance(error.__cause__, Interrupt):
        return error.__cause__
    return error


def _begin_anew() -> None:
    global _slots, _mine, _timer  # noqa: PLW0603 - an object around them would cost every job two look-ups more
    _slots = {}
    _mine = _OfThisThread()
    _timer = Timer(_attend)


def _after_fork_in_child() -> None:
    for slot in _slots.values():
        # A thread that is not here may have held it, and the job that forked looks at it once it ends.
        slot.lock = Lock()
    _begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
