"""What can be said of a callable before it is called."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["accepts", "is_coroutine_callable"]


def is_coroutine_callable(fn: Any) -> bool:
    """Whether calling it gives a coroutine: also for partials and objects with an async ``__call__``."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(
        getattr(type(fn), "__call__", None)  # noqa: B004 - not whether it can be called
    )


def accepts(fn: Callable[..., Any], count: int) -> bool:
    """Whether it can be called with so many positional arguments; True where a callable does not say."""
    try:
        # A decorator may take other arguments than what it wraps.
        signature = inspect.signature(fn, follow_wrapped=False)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True
