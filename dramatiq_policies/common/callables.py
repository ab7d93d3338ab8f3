"""What can be said of a callable before it is called."""

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
    """What a wrapper of ours wraps, and for which actor. `functools.wraps` copies the mark onto functions of the user's."""

    __slots__ = ("actor_name", "wrapped", "wrapper")

    def __init__(self, wrapper: Any, wrapped: Any, actor_name: str) -> None:
        self.wrapper = wrapper
        self.wrapped = wrapped
        self.actor_name = actor_name


def mark_wrapper(wrapper: Any, wrapped: Any, actor_name: str) -> None:
    """Mark a wrapper that stands in the place of an actor's function."""
    setattr(wrapper, _MARK, _Mark(wrapper, wrapped, actor_name))


def unwrapped(fn: Any) -> Any:
    """The user's function inside of a marked wrapper; any other callable, a copy of a wrapper included, as it is."""
    mark = getattr(fn, _MARK, None)
    return mark.wrapped if isinstance(mark, _Mark) and mark.wrapper is fn else fn


def is_coroutine_callable(fn: Any) -> bool:
    """Whether calling it gives a coroutine: also for partials and objects with an async ``__call__``."""
    return _is_any(fn, inspect.iscoroutinefunction)


def returns_coroutine_or_generator(fn: Any) -> bool:
    """Whether calling it runs nothing of what it is written to do: it gives a coroutine or a generator."""
    return _is_any(fn, inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)


def is_sync_callable(fn: Any, count: int) -> bool:
    """Whether it can be called with so many positional arguments, and does its work then."""
    return callable(fn) and not returns_coroutine_or_generator(fn) and accepts(fn, count)


def _is_any(fn: Any, *kinds: Callable[[Any], bool]) -> bool:
    while isinstance(fn, functools.partial):
        fn = fn.func
    called = getattr(type(fn), "__call__", None)  # noqa: B004 - not whether it can be called
    return any(kind(fn) or kind(called) for kind in kinds)


def accepts(fn: Callable[..., Any], count: int) -> bool:
    """Whether it can be called with so many positional arguments; True where a callable does not say."""
    signature = stated_signature(fn)
    return signature is None or _takes(signature, count, ())


def accepts_call_of(fn: Callable[..., Any], signature: inspect.Signature) -> bool:
    """Whether it takes any of the calls that a signature takes; True where a callable does not say."""
    own = stated_signature(fn)
    if own is None:
        return True
    both = (own, signature)
    for count in range(max(len(one.parameters) for one in both) + 1):
        # So many by position, and by name no more than one of the two must have.
        names = {name for one in both for name in _required_names(one, count)}
        if all(_takes(one, count, names) for one in both):
            return True
    return False


def stated_signature(fn: Callable[..., Any]) -> inspect.Signature | None:
    """What a callable says that it takes itself, None if it does not: some that are written in C."""
    try:
        # A decorator may take other arguments than what it wraps.
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
    """The parameters without a default that so many arguments by position leave to be given by name."""
    for index, one in enumerate(signature.parameters.values()):
        left = one.kind is one.KEYWORD_ONLY or (one.kind is one.POSITIONAL_OR_KEYWORD and index >= count)
        if left and one.default is one.empty:
            yield one.name
