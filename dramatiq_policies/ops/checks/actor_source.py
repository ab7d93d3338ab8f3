"""The place of an actor's declaration, and its docstring."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dramatiq import Actor

__all__ = ["purpose_of", "source_of"]


def source_of(actor: Actor[..., Any]) -> tuple[str | None, int | None]:
    """Return the file (relative to the current folder) and the line of an actor's function or class."""
    fn: Any = inspect.unwrap(actor.fn)
    try:
        if hasattr(fn, "__code__"):
            file, line = fn.__code__.co_filename, fn.__code__.co_firstlineno
        else:
            file, line = str(inspect.getsourcefile(type(fn))), inspect.getsourcelines(type(fn))[1]
    except (OSError, TypeError):
        return None, None
    relative = os.path.relpath(file)
    return (file if relative.startswith("..") else relative), line


def purpose_of(actor: Actor[..., Any]) -> str | None:
    """Return the docstring of an actor's function, of its class, or of the class's ``perform``."""
    fn: Any = inspect.unwrap(actor.fn)
    if hasattr(fn, "__code__"):
        return inspect.getdoc(fn)
    # Without inheritance: the docstring of GenericActor does not describe the job.
    for part in (type(fn), vars(type(fn)).get("perform")):
        text = getattr(part, "__dict__", {}).get("__doc__") or (part.__doc__ if inspect.isfunction(part) else None)
        if text:
            return str(text)
    return None
