"""Call a function before each line of a job."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from dramatiq.asyncio import async_to_sync

from ..interrupts.coroutines import is_async

__all__ = ["END", "code_of", "with_traced_lines"]

#: In the place of a line's number: after the last line.
END = 0


def code_of(fn: Any) -> CodeType:
    """Return the code of the actor's own function, without decorators."""
    fn = inspect.unwrap(fn)
    while isinstance(fn, functools.partial):
        fn = inspect.unwrap(fn.func)
    if not hasattr(fn, "__code__"):
        # A class-based actor.
        fn = inspect.unwrap(getattr(type(fn), "perform", type(fn).__call__))
    code: CodeType = fn.__code__
    return code


def with_traced_lines(fn: Any, code: CodeType, reach: Callable[[int], None]) -> Any:
    """Return ``fn`` with a call of ``reach`` before each line of ``code`` and of nested functions, and at the end with `END`."""
    codes = {code, *_nested_in(code)}

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        return trace_lines if frame.f_code in codes else None

    def trace_lines(frame: FrameType, event: str, arg: object) -> Any:
        if event == "line":
            reach(frame.f_lineno)
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
            reach(END)
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
        reach(END)
        return result

    return run


def _nested_in(code: CodeType) -> list[CodeType]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return [*inner, *(deeper for one in inner for deeper in _nested_in(one))]
