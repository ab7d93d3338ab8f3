"""Inspect callables without calling them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

__all__ = [
    "accepts",
    "accepts_call_of",
    "is_coroutine_callable",
    "is_sync_callable",
    "mark_wrapper",
    "returns_coroutine_or_generator",
    "stated_signature",
    "unwrapped",
]

_MARK = "dramatiq_policies_wraps"


class _Mark:
    """The wrapped function and the actor of a wrapper. `functools.wraps` copies the mark onto user functions."""

    __slots__ = ("actor_name", "wrapped", "wrapper")

    def __init__(self, wrapper: object, wrapped: object, actor_name: str) -> None:
        self.wrapper = wrapper
        self.wrapped = wrapped
        self.actor_name = actor_name


def mark_wrapper(wrapper: object, wrapped: object, actor_name: str) -> None:
    """Mark a wrapper that replaces an actor's function."""
    setattr(wrapper, _MARK, _Mark(wrapper, wrapped, actor_name))


def unwrapped(fn: Any) -> Any:
    """Return the user function of a marked wrapper. Return any other callable (even a copy of a wrapper) unchanged."""
    mark = getattr(fn, _MARK, None)
    return mark.wrapped if isinstance(mark, _Mark) and mark.wrapper is fn else fn


def is_coroutine_callable(fn: Any) -> bool:
    """Return whether a call gives a coroutine. Looks through partials and an async ``__call__``."""
    return _is_any(fn, inspect.iscoroutinefunction)


def returns_coroutine_or_generator(fn: Any) -> bool:
    """Return whether a call only makes a coroutine or a generator, and runs none of the body."""
    return _is_any(fn, inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)


def is_sync_callable(fn: Any, count: int) -> bool:
    """Return whether this is a plain function that takes ``count`` positional arguments."""
    return callable(fn) and not returns_coroutine_or_generator(fn) and accepts(fn, count)


def _is_any(fn: Any, *kinds: Callable[[Any], bool]) -> bool:
    while isinstance(fn, functools.partial):
        fn = fn.func
    called = getattr(type(fn), "__call__", None)  # noqa: B004 - not whether it can be called
    return any(kind(fn) or kind(called) for kind in kinds)


def accepts(fn: Callable[..., Any], count: int) -> bool:
    """Return whether the callable takes ``count`` positional arguments. True if the signature is unknown."""
    signature = stated_signature(fn)
    return signature is None or _takes(signature, count, ())


def accepts_call_of(fn: Callable[..., Any], signature: inspect.Signature) -> bool:
    """Return whether at least one call fits both the callable and the signature. True if its own signature is unknown."""
    own = stated_signature(fn)
    if own is None:
        return True
    both = (own, signature)
    for count in range(max(len(one.parameters) for one in both) + 1):
        # ``count`` by position; by name, the required parameters of either.
        names = {name for one in both for name in _required_names(one, count)}
        if all(_takes(one, count, names) for one in both):
            return True
    return False


def stated_signature(fn: Callable[..., Any]) -> inspect.Signature | None:
    """Return the signature of the callable itself, or None (some callables written in C)."""
    try:
        # A decorator may take other arguments than the wrapped function.
        return inspect.signature(fn, follow_wrapped=False)
    except (TypeError, ValueError):
        return None


def _takes(signature: inspect.Signature, count: int, names: Iterable[str]) -> bool:
    try:
        signature.bind(*range(count), **dict.fromkeys(names))
    except TypeError:
        return False
    return True


def _required_names(signature: inspect.Signature, count: int) -> Iterator[str]:
    """Yield the required parameters that are left after ``count`` positional arguments."""
    for index, one in enumerate(signature.parameters.values()):
        left = one.kind is one.KEYWORD_ONLY or (one.kind is one.POSITIONAL_OR_KEYWORD and index >= count)
        if left and one.default is one.empty:
            yield one.name
