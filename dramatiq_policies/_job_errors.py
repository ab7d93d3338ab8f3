"""Reading the exceptions of jobs, whose attributes and methods are anybody's code.

An exception's ``__str__``, a property, ``__getattr__`` or ``__class__`` may raise anything, ``SystemExit`` and
``RecursionError`` included. Outside of the job that would end the worker's thread. All reading of a user's exception goes
through this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeGuard, TypeVar

from .errors import UnreadableError

__all__ = ["is_a", "quietly", "stand_in_for"]

R = TypeVar("R")
E = TypeVar("E", bound=BaseException)

#: How many errors of a chain of causes are looked at.
_CHAIN = 1_000


def quietly(read: Callable[[], R]) -> R | None:
    """Return ``read()``, or None if it raises anything at all."""
    try:
        return read()
    except BaseException:  # Not even an exit: it would end the worker's thread.
        return None


def is_a(error: object, kinds: type[E] | tuple[type[E], ...]) -> TypeGuard[E]:
    """``isinstance`` by the real type alone: ``isinstance`` may read ``error.__class__``."""
    return issubclass(type(error), kinds)


def stand_in_for(error: BaseException) -> UnreadableError | None:
    """Return None if Dramatiq, ``logging`` and ``traceback`` can read the error and its causes, else one to raise in its place.

    They read its truth, ``__class__``, ``__traceback__``, ``__notes__`` and the chain of causes. An error whose ``__getattr__`` fails for
    want of ``__notes__`` is given empty ones, and is itself again.
    """
    try:
        for one in _with_causes(error):
            bool(one), one.__class__, one.__traceback__, one.__suppress_context__
            if quietly(lambda one=one: (getattr(one, "__notes__", None),)) is None:  # type: ignore[misc]
                one.__notes__ = []  # type: ignore[attr-defined]
                getattr(one, "__notes__", None)
    except BaseException as broken:  # As in `quietly`.
        name, raised = type(error).__qualname__, type(broken).__qualname__
        return UnreadableError(f"{name}: reading this error, or one of its causes, raised {raised}")
    return None


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    pending, seen = [error], set[int]()
    while pending and len(seen) < _CHAIN:
        one = pending.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        pending += [cause for cause in (one.__cause__, one.__context__) if cause is not None]
        if leaves := getattr(one, "exceptions", None) if _is_group(type(one)) else None:
            pending += leaves


def _is_group(cls: type[Any]) -> bool:
    return any(base.__name__ == "BaseExceptionGroup" for base in cls.__mro__)
