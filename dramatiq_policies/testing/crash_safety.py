"""`assert_crash_safe`: what becomes of a job's effects when its worker dies at any of its lines."""

from __future__ import annotations

import copy
import functools
import inspect
import linecache
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from dramatiq.asyncio import async_to_sync

from ..common.callables import unwrapped
from ..interrupts.coroutines import is_async
from .draining import drain
from .faults import die_in_job, redeliver
from .patching import in_place_of
from .stubbing import stub

if TYPE_CHECKING:
    from dramatiq import Actor

    from .run import Run

__all__ = ["assert_crash_safe"]

#: The line after the last one: the job is over, and its message not yet acked.
_END = 0


class Point(NamedTuple):
    """Where a worker dies: before a line runs, for the ``visit``-th time."""

    line: int
    visit: int


def assert_crash_safe(
    actor: Actor[..., Any],
    *args: Any,
    effects: Callable[[], Any],
    reset: Callable[[], object],
    **kwargs: Any,
) -> None:
    """Fail if a crash at some line of an actor, and the redelivery that follows, changes what the job has done in all.

    The job runs undisturbed; then once for each line that it came by, with the worker dying just before that line (in a
    loop: the first, second and last time) and the message delivered again; once with the worker dying after the last
    line, before the ack; and once with its message delivered twice. Each time it runs until nothing is queued, on a
    StubBroker of its own, its idempotency store empty.

    Parameters:
      args, kwargs: What the actor is sent.
      effects: Says what the job has done, such as the mails that were sent. Compared by ``==``, so it must not depend on
        the time or on message ids.
      reset: Puts everything back to where it was before the job. Called before each run.

    Raises:
      AssertionError: The effects differ, with the lines to blame; or the job does not even succeed undisturbed.

    Warns if ``effects()`` is the same before the job and after it.

    What it can't see: ``finally`` and ``except BaseException`` blocks run, as they would not if the process died; a call
    into C, or into a function of yours, is one line, which happens or does not.
    """
    __tracebackhide__ = True
    scene = _Scene(actor, args, kwargs, effects, reset)
    expected = scene.undisturbed()
    unsafe = []
    for point in scene.points:
        got, _ = scene.play(die_at=point)
        if got != expected:
            unsafe.append(f"  when the worker dies {scene.describe(point)}\n    effects() is {got!r}")
    got, _ = scene.play(twice=True)
    if got != expected:
        unsafe.append(f"  when its message is delivered twice\n    effects() is {got!r}")
    if unsafe:
        found = "\n".join(unsafe)
        raise AssertionError(
            f"{actor.actor_name} is not crash-safe. Undisturbed, effects() is {expected!r}. But\n{found}"
        )


class _Scene:
    """A job and its effects, to be played again and again."""

    def __init__(
        self,
        actor: Actor[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        effects: Callable[[], Any],
        reset: Callable[[], object],
    ) -> None:
        self.actor = actor
        self.args, self.kwargs = args, kwargs
        self.effects, self.reset = effects, reset
        self.code = _code_of(unwrapped(actor.fn))
        self.visited: list[int] = []

    def undisturbed(self) -> Any:
        """The effects without a crash; the lines that the job comes by are known afterwards."""
        __tracebackhide__ = True
        name = self.actor.actor_name
        self.reset()
        before = self._look()
        # Once without tracing: whoever measures coverage sees it.
        expected, run = self.play(traced=False)
        if run.outcomes(self.actor)[-1:] != ["succeeded"]:
            raise AssertionError(f"{name} does not succeed even undisturbed.\n{run!r}")
        if expected == before:
            warnings.warn(
                f"{name}: effects() is {before!r} before the job and after it: it sees nothing of it, so no crash will "
                "change it.",
                stacklevel=3,
            )
        again, _ = self.play()
        if again != expected:
            raise AssertionError(
                f"{name}: effects() is {expected!r} after one undisturbed run and {again!r} after another. Let reset() "
                "undo all of it, and leave out of effects() what depends on the time or on message ids."
            )
        return expected

    @property
    def points(self) -> list[Point]:
        """The first, second and last time that it came by each line."""
        counts = Counter(self.visited)
        return [
            Point(line, visit)
            for line in dict.fromkeys(self.visited)
            for visit in sorted({1, min(2, counts[line]), counts[line]})
        ]

    def describe(self, point: Point) -> str:
        file = self.code.co_filename
        if point.line == _END:
            return f"after the last line of the job, before the ack:\n    {file}"
        source = linecache.getline(file, point.line).strip()
        time = "" if point.visit == 1 else f" (time {point.visit})"
        return f"before line {point.line}{time}:\n    {file}:{point.line}: {source}"

    def play(self, *, die_at: Point | None = None, twice: bool = False, traced: bool = True) -> tuple[Any, Run]:
        self.reset()
        visits: Counter[int] = Counter()
        self.visited = visited = [] if die_at is None else self.visited

        def come_by(line: int) -> None:
            if die_at is None:
                visited.append(line)
                return
            visits[line] += 1
            if (line, visits[line]) == die_at:
                die_in_job("assert_crash_safe()")

        def trace(fn: Any) -> Any:
            return _traced(fn, self.code, come_by) if traced else fn

        with stub(self.actor.broker) as broker, in_place_of(self.actor, trace):
            message = self.actor.send(*self.args, **self.kwargs)
            if twice:
                redeliver(message, broker)
            run = drain(broker)
        return self._look(), run

    def _look(self) -> Any:
        seen = self.effects()
        try:
            return copy.deepcopy(seen)
        except Exception:
            return seen


def _code_of(fn: Any) -> CodeType:
    """The code of the actor's own function, whatever decorates it."""
    fn = inspect.unwrap(fn)
    while isinstance(fn, functools.partial):
        fn = inspect.unwrap(fn.func)
    if not hasattr(fn, "__code__"):
        # A class-based actor.
        fn = inspect.unwrap(getattr(type(fn), "perform", type(fn).__call__))
    code: CodeType = fn.__code__
    return code


def _traced(fn: Any, code: CodeType, come_by: Callable[[int], None]) -> Any:
    """``fn``, which says before each line of ``code`` (and of what is defined in it) that it comes by."""
    codes = {code, *_within(code)}

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        return trace_lines if frame.f_code in codes else None

    def trace_lines(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            come_by(frame.f_lineno)
        return trace_lines

    if is_async(fn):
        coroutine = fn.__wrapped__

        @functools.wraps(coroutine)
        async def run_async(*args: Any, **kwargs: Any) -> Any:
            before = sys.gettrace()
            sys.settrace(trace)
            try:
                result = await coroutine(*args, **kwargs)
            finally:
                sys.settrace(before)
            come_by(_END)
            return result

        return async_to_sync(run_async)

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            result = fn(*args, **kwargs)
        finally:
            sys.settrace(before)
        come_by(_END)
        return result

    return run


def _within(code: CodeType) -> list[CodeType]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return [*inner, *(deeper for one in inner for deeper in _within(one))]
