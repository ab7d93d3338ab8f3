"""The text of a job's traceback, for the options of messages and for dead letters."""

from __future__ import annotations

import traceback
from types import CodeType, TracebackType

from .._job_errors import is_a, is_group, quietly, user_frames
from ..common.texts import encodable
from ..outcomes import class_path, text_of

__all__ = ["traceback_of"]

_LONGEST = 10_000
_FRAMES = 30
#: Errors with a suggestion or with source lines after the message.
_WITH_MORE_LINES = (SyntaxError, NameError, AttributeError, ImportError)
_HEADING = "Traceback (most recent call last):\n"

#: Formatted stacks by the places of their frames. Jobs fail at few places, and formatting costs as much as several jobs: Python
#: reads each source line and parses it for the markers. The code objects are kept, so that each id stays unique.
_formatted: dict[tuple[tuple[int, int, int], ...], tuple[list[CodeType], str]] = {}
_MOST_FORMATTED = 500


def traceback_of(error: BaseException) -> str | None:
    """Return an error's traceback from the user's code on, the last 10,000 characters; None if the error has none."""
    stack = user_frames(quietly(lambda: error.__traceback__))
    if stack is None:
        return None
    text = quietly(lambda: _text_of(error, stack))
    if text is None:
        text = f"{_HEADING}{_frames_of(stack)}{class_path(type(error))}: {text_of(error)}\n"
    text = encodable(text)
    # The end of a traceback says most.
    return text if len(text) <= _LONGEST else "…" + text[1 - _LONGEST :]


def _text_of(error: BaseException, stack: TracebackType) -> str:
    """Return the text of ``traceback.format_exception``."""
    hides_context = error.__suppress_context__ or error.__context__ is None
    if error.__cause__ is not None or not hides_context or is_group(type(error)):
        return "".join(traceback.format_exception(type(error), error, stack, limit=-_FRAMES))
    return f"{_HEADING}{_frames_of(stack)}{_last_lines_of(error, stack)}"


def _last_lines_of(error: BaseException, stack: TracebackType) -> str:
    """Return the text of ``traceback.format_exception_only``, with suggestions ("Did you mean")."""
    kind = type(error)
    if is_a(error, _WITH_MORE_LINES) or getattr(error, "__notes__", None):
        # Given the stack for the suggestions, but no frames to format.
        return "".join(traceback.TracebackException(kind, error, stack, limit=0).format_exception_only())
    name, text = kind.__qualname__, str(error)
    if kind.__module__ not in ("builtins", "__main__"):
        name = f"{kind.__module__}.{name}"
    return f"{name}: {text}\n" if text else f"{name}\n"


def _frames_of(stack: TracebackType) -> str:
    """Return the text of ``traceback.format_tb`` for the last frames of a stack."""
    codes, places = [], []
    frame: TracebackType | None = stack
    while frame is not None:
        code = frame.tb_frame.f_code
        codes.append(code)
        places.append((id(code), frame.tb_lasti, frame.tb_lineno))
        frame = frame.tb_next
    key = tuple(places[-_FRAMES:])
    known = _formatted.get(key)
    if known is None:
        if len(_formatted) >= _MOST_FORMATTED:
            _formatted.clear()
        known = _formatted[key] = codes[-_FRAMES:], "".join(traceback.format_tb(stack, limit=-_FRAMES))
    return known[1]
