"""Where an actor is declared, and what its docstring says."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dramatiq import Actor

__all__ = ["purpose_of", "source_of"]


def source_of(actor: Actor[..., Any]) -> tuple[str | None, int | None]:
    """The file, from the current folder, and the line of an actor's function or class."""
    fn: Any = inspect.unwrap(actor.fn)
    try:
        if hasattr(fn, "__code__"):
            file, line = fn.__code__.co_filename, fn.__code__.co_firstlineno
        else:
            file, line = str(inspect.getsourcefile(type(fn))), inspect.getsourcelines(type(fn))[1]
    except (OSError, TypeError):
        return None, None
    near = os.path.relpath(file)
    return (file if near.startswith("..") else near), line


def purpose_of(actor: Actor[..., Any]) -> str | None:
    """The docstring of an actor's function; of a class or its ``perform``, their own."""
    fn: Any = inspect.unwrap(actor.fn)
    if hasattr(fn, "__code__"):
        return inspect.getdoc(fn)
    # Not what a class inherits: GenericActor's own docstring says nothing of the job.
    for part in (type(fn), vars(type(fn)).get("perform")):
        text = getattr(part, "__dict__", {}).get("__doc__") or (part.__doc__ if inspect.isfunction(part) else None)
        if text:
            return str(text)
    return None
