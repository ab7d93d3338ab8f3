"""Run an async actor and cancel its task at its deadline or at shutdown: `run` of `threads`, for coroutine functions.

Dramatiq turns an async actor into a function that runs the coroutine on the event loop thread. The worker thread waits and
wakes every 100 ms, so that an exception set in the worker thread can be raised. Here the timer sets no exception in the
worker thread: the timer asks the loop to cancel the task, at once. The worker thread still wakes every 100 ms, for
interrupts of other code: an abort cancels the task, too.

Only the loop decides whether the coroutine has ended, so no interrupt comes too late: the loop does not cancel a coroutine
that has ended, and a later interrupt in the worker thread is dropped. The coroutine may handle the cancellation, as a
function may handle an exception: an error raised is the job's error, a value returned is the job's result, and clean-up may
take any time. The worker waits without a limit (Dramatiq waits one second and then leaves the coroutine running, beside its
own retry). After the timeout and its grace, the worker reports the job as stuck.
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

from ..common.current import Job
from ..errors import TimeoutExceeded
from .slots import StuckListener, Tokens, frame_of, noop
from .threads import arm, slot_of_this_thread

__all__ = ["is_async", "run"]

R = TypeVar("R")


async def _nothing() -> None: ...


#: The code of Dramatiq's wrapper around a coroutine function.
_wrapper_code = getattr(async_to_sync(_nothing), "__code__", None)


def is_async(fn: Callable[..., Any]) -> bool:
    """Return whether ``fn`` is Dramatiq's wrapper around a coroutine function."""
    return getattr(fn, "__code__", None) is _wrapper_code and hasattr(fn, "__wrapped__")


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
    on_cancel: Callable[[], object] = noop,
) -> R:
    """Do as `threads.run`, for an ``fn`` that `is_async`.

    A task is cancelled where it awaits, never inside a call of a client: ``after_interrupt`` is not needed. ``on_cancel`` is
    called on the loop's thread when the task is cancelled, also if the job handles the cancellation.
    """
    thread = get_event_loop_thread()
    slot = slot_of_this_thread()
    if thread is None or not thread.loop.is_running() or slot.tokens is not None or current_thread() is thread:
        # No loop to run on: Dramatiq raises an error with the cause.
        return fn(*args, **kwargs)
    running = _Run(thread, cast("Any", fn).__wrapped__(*args, **kwargs), on_cancel)
    tokens: Tokens = {TimeoutExceeded: True, Shutdown: True} if on_shutdown else {TimeoutExceeded: True}
    try:
        try:
            arm(
                slot, tokens, running, due=inf if deadline is None else deadline, stuck_listener=stuck_listener, job=job
            )
            # The loop copies this thread's context.
            running.begin()
            running.join()
        except BaseException as raised:  # Raised in this thread by other code.
            running.end_by(raised)
        slot.disarm(tokens)
    except BaseException:  # As above, one line late.
        slot.disarm(tokens)
        if not running.over:
            raise
    return cast("R", running.wait())


class _Run:
    """One run of a coroutine function. Methods with an underscore run on the loop's thread, except `_on_loop`."""

    __slots__ = (
        "coroutine",
        "ended",
        "error",
        "interrupted_by",
        "on_cancel",
        "over",
        "result",
        "started",
        "task",
        "thread",
    )

    def __init__(
        self, thread: EventLoopThread, coroutine: Coroutine[Any, Any, Any], on_cancel: Callable[[], object] = noop
    ) -> None:
        self.thread = thread
        self.on_cancel = on_cancel
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
            pass  # The loop is closed: `join` notices.

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
        # Even SystemExit stops here: it would end the loop and with it all other jobs.
        except BaseException as error:
            self.error = error
        finally:
            self.over = True
            self.ended.release()

    def _cancel(self, exception: BaseException | type[BaseException]) -> None:
        if self.over:
            return
        self.interrupted_by = exception
        self.on_cancel()
        # The interrupt may have come before `begin`.
        self._start()
        # A task cancelled before its first step never runs `_main`, and would not be reported.
        if self.started and self.task is not None:
            self.task.cancel((exception if isinstance(exception, type) else type(exception)).__name__)

    def interrupt(self, exception: BaseException | type[BaseException]) -> None:
        """Cancel the task: called by the timer, at shutdown, and for exceptions raised in the worker thread."""
        self._on_loop(self._cancel, exception)

    def join(self) -> None:
        """Wait until the coroutine has ended. Exceptions set in this thread are raised here."""
        while not self.over:
            # `over` counts, not the result of `acquire`: an interrupt may strike before the result is stored.
            self.ended.acquire(timeout=self.thread.interrupt_check_ival)
            if self.thread.loop.is_closed() and not self.over:
                self.error, self.over = RuntimeError("Event loop is not running."), True

    def end_by(self, raised: BaseException) -> None:
        """Cancel the coroutine because of an exception raised in the worker thread, and wait for its end."""
        while not self.over:
            try:
                self.interrupt(raised)
                self.join()
            except BaseException as again:
                raised = again

    def wait(self) -> Any:
        """Return the result or raise the error, once the coroutine has ended."""
        self.join()
        error, self.error = self.error, None
        if error is None:
            return self.result
        try:
            if not isinstance(error, asyncio.CancelledError):
                raise error
            if self.interrupted_by is not None:
                raise self.interrupted_by from error
            # The job cancelled itself; Dramatiq raises this error, too.
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
            # The coroutine does not await: it blocks the loop and all other async jobs.
            return "".join(format_stack(top))
        return "".join(StackSummary.extract((frame, frame.f_lineno) for frame in frames).format())
