"""Running an async actor so that it can be interrupted: `call`, as in `interrupts`, for coroutine functions.

Dramatiq turns an async actor into a function that runs the coroutine on its event loop thread and waits for it, looking
up every 100 ms for an interrupt that was raised in the waiting thread. Here the timer raises nothing in that thread: the
timer asks the loop to cancel the task, at once. The waiting thread looks up as often, for interrupts that others raise in
it: an abort cancels the task, too.

Whether the coroutine has ended is known on the loop and decided there, so no interrupt can come too late: a coroutine that
has ended is not cancelled, and an interrupt that is raised in the waiting thread after that is dropped. What it does with the cancellation is its own affair, as it is in a thread: what it raises is its
error, what it returns is its result, and its clean-up may take as long as it takes. The worker waits for it without a
bound (Dramatiq gives it one second and then leaves it running, beside its own retry); past the timeout and its grace
it is reported as stuck.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Coroutine, Mapping, Sequence
from math import inf
from threading import Lock, current_thread
from traceback import StackSummary, format_stack, walk_stack
from types import FrameType
from typing import Any, TypeVar, cast

from dramatiq.asyncio import EventLoopThread, async_to_sync, get_event_loop_thread
from dramatiq.middleware import Shutdown

from ..errors import TimeoutExceeded
from .slots import Tokens, Watch, frame_of
from .threads import arm, nothing, slot_of_this_thread

__all__ = ["call", "is_async"]

R = TypeVar("R")


async def _nothing() -> None: ...


#: The code of every function that Dramatiq makes of a coroutine function.
_wrapper_code = getattr(async_to_sync(_nothing), "__code__", None)


def is_async(fn: Callable[..., Any]) -> bool:
    """Whether ``fn`` is what Dramatiq made of a coroutine function."""
    return getattr(fn, "__code__", None) is _wrapper_code and hasattr(fn, "__wrapped__")


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
    """As `interrupts.call`, for an ``fn`` that `is_async`.

    A task is cancelled where it awaits something, and never in the middle of a call: ``after_interrupt`` is not needed.
    """
    thread = get_event_loop_thread()
    slot = slot_of_this_thread()
    if thread is None or not thread.loop.is_running() or slot.tokens is not None or current_thread() is thread:
        # Where it can't run, Dramatiq says why.
        return fn(*args, **kwargs)
    run = _Run(thread, cast("Any", fn).__wrapped__(*args, **kwargs))
    tokens: Tokens = {TimeoutExceeded: True, Shutdown: True} if on_shutdown else {TimeoutExceeded: True}
    try:
        try:
            arm(slot, tokens, run, due=inf if deadline is None else deadline, watch=watch, job=job)
            # The loop runs it in a copy of this thread's context.
            run.begin()
            run.join()
        except BaseException as raised:  # By somebody else, in this thread.
            run.end_by(raised)
        slot.disarm(tokens)
    except BaseException:  # As above, one line late.
        slot.disarm(tokens)
        if not run.over:
            raise
    return cast("R", run.wait())


class _Run:
    """One call of a coroutine function. What begins with an underscore happens on the loop's thread."""

    __slots__ = ("coroutine", "ended", "error", "interrupted_by", "over", "result", "started", "task", "thread")

    def __init__(self, thread: EventLoopThread, coroutine: Coroutine[Any, Any, Any]) -> None:
        self.thread = thread
        self.coroutine = coroutine
        self.task: asyncio.Task[None] | None = None
        self.started = self.over = False
        self.interrupted_by: BaseException | type[BaseException] | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.ended = Lock()
        self.ended.acquire()

    def begin(self) -> None:
        """Have the loop start the coroutine."""
        self._on_loop(self._start)

    def _on_loop(self, callback: Callable[..., object], *args: Any) -> None:
        try:
            self.thread.loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            pass  # The loop was closed, which `join` sees.

    def _start(self) -> None:
        if self.task is None:
            self.task = self.thread.loop.create_task(self._main())

    async def _main(self) -> None:
        self.started = True
        try:
            if self.interrupted_by is not None:
                self.coroutine.close()
                raise asyncio.CancelledError
            self.result = await self.coroutine
        except GeneratorExit:
            self.error = RuntimeError("Event loop is not running.")
            raise
        # Not even SystemExit goes on from here: it would end the loop under all other jobs.
        except BaseException as error:
            self.error = error
        finally:
            self.over = True
            self.ended.release()

    def _cancel(self, exception: BaseException | type[BaseException]) -> None:
        if self.over:
            return
        self.interrupted_by = exception
        # What was raised while the waiting thread was about to start it may have come before that.
        self._start()
        # A task that is cancelled before its first step never takes it, and nobody would be told.
        if self.started and self.task is not None:
            self.task.cancel((exception if isinstance(exception, type) else type(exception)).__name__)

    def interrupt(self, exception: BaseException | type[BaseException]) -> None:
        """Called by the timer, by a shutdown, and for what somebody raised in the waiting thread."""
        self._on_loop(self._cancel, exception)

    def join(self) -> None:
        """Return once the coroutine has ended. What somebody raises in this thread meanwhile is raised here."""
        while not self.over:
            # Whether it was acquired is not asked: an interrupt may be raised before that is known.
            self.ended.acquire(timeout=self.thread.interrupt_check_ival)
            if self.thread.loop.is_closed() and not self.over:
                self.error, self.over = RuntimeError("Event loop is not running."), True

    def end_by(self, raised: BaseException) -> None:
        """Cancel the coroutine for an exception that somebody raised in the waiting thread, and wait for its end."""
        while not self.over:
            try:
                self.interrupt(raised)
                self.join()
            except BaseException as again:
                raised = again

    def wait(self) -> Any:
        """The result, or the error raised, once the coroutine has ended."""
        self.join()
        error, self.error = self.error, None
        if error is None:
            return self.result
        try:
            if not isinstance(error, asyncio.CancelledError):
                raise error
            if self.interrupted_by is not None:
                raise self.interrupted_by from error
            # The job's own doing; this is what Dramatiq raises for it.
            raise concurrent.futures.CancelledError from error
        finally:
            del error

    def stack(self) -> str:
        frames: list[FrameType] = []
        awaiting: Any = self.coroutine
        while awaiting is not None:
            frame = getattr(awaiting, "cr_frame", None) or getattr(awaiting, "gi_frame", None)
            if frame is not None:
                frames.append(frame)
            awaiting = getattr(awaiting, "cr_await", None) or getattr(awaiting, "gi_yieldfrom", None)
        top = frame_of(self.thread.ident or 0)
        if any(frame in frames for frame, _ in walk_stack(top)):
            # It does not wait: it blocks the loop, and all other async jobs.
            return "".join(format_stack(top))
        return "".join(StackSummary.extract((frame, frame.f_lineno) for frame in frames).format())
