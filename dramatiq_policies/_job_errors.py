"""Read the exceptions of jobs, and survive the user code in them.

An exception's ``__str__``, a property, ``__getattr__`` or ``__class__`` may raise any exception, also ``SystemExit`` and
``RecursionError``. Outside the job that would end the worker's thread. So all other modules read a user's exception through
this module.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeGuard, TypeVar

import dramatiq

from .errors import UnreadableError

__all__ = ["exc_info_of", "is_a", "is_group", "quietly", "stand_in_for", "user_frames"]

R = TypeVar("R")
E = TypeVar("E", bound=BaseException)

_GROUP: type[BaseException] | None = getattr(builtins, "BaseExceptionGroup", None)

#: The most errors of a chain of causes that are read.
_CHAIN = 1_000


def quietly(read: Callable[[], R]) -> R | None:
    """Return ``read()``, or None if it raises anything at all."""
    try:
        return read()
    except BaseException:  # Not even an exit: it would end the worker's thread.
        return None


def is_a(error: object, kinds: type[E] | tuple[type[E], ...]) -> TypeGuard[E]:
    """Do as ``isinstance``, without reading ``error.__class__``, which may raise."""
    return issubclass(type(error), kinds)


def stand_in_for(error: BaseException) -> UnreadableError | None:
    """Return None if Dramatiq, ``logging`` and ``traceback`` can read an error and its causes; else an error to raise instead.

    They read its truth value, ``__class__``, ``__traceback__``, ``__notes__`` and the chain of causes. Where ``__getattr__`` fails
    because ``__notes__`` is missing, this function sets empty notes, and the error stays.
    """
    try:
        for one in _with_causes(error):
            bool(one), one.__class__, one.__traceback__, one.__suppress_context__
            try:
                getattr(one, "__notes__", None)
            except BaseException:  # As in `quietly`.
                one.__notes__ = []  # type: ignore[attr-defined]
                getattr(one, "__notes__", None)
    except BaseException as broken:  # As in `quietly`.
        name, raised = type(error).__qualname__, type(broken).__qualname__
        return UnreadableError(f"{name}: reading this error or one of its causes raised {raised}")
    return None


#: The folders whose frames come before the user's code in a job's traceback.
_MACHINERY = tuple(f"{os.path.dirname(file)}/" for file in (dramatiq.__file__, __file__))  # noqa: PTH120


def user_frames(stack: TracebackType | None) -> TracebackType | None:
    """Return the traceback from the first frame of the user's code on; the whole if it has none."""
    first = stack
    while first is not None and first.tb_frame.f_code.co_filename.startswith(_MACHINERY):
        first = first.tb_next
    return stack if first is None else first


def exc_info_of(
    error: BaseException, *, whole: bool
) -> tuple[type[BaseException], BaseException, TracebackType | None]:
    """Return the ``exc_info`` for a log record: with all frames, or from the user's code on."""
    stack: TracebackType | None = quietly(lambda: error.__traceback__)
    return type(error), error, stack if whole else user_frames(stack)


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    pending, seen = [error], set[int]()
    while pending and len(seen) < _CHAIN:
        one = pending.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        pending += [cause for cause in (one.__cause__, one.__context__) if cause is not None]
        if leaves := getattr(one, "exceptions", None) if is_group(type(one)) else None:
            pending += leaves


def is_group(cls: type[Any]) -> bool:
    """Whether a class of errors is an exception group."""
    if _GROUP is not None:
        return issubclass(cls, _GROUP)
    # Before Python 3.11: of the package exceptiongroup.
    return any(base.__name__ == "BaseExceptionGroup" for base in cls.__mro__)
