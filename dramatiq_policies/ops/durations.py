"""Print and read durations for people: ``850 ms``, ``20 s``, ``24 h``, ``7 d``."""

from __future__ import annotations

import re

__all__ = ["describe_wait", "format_duration", "parse_duration"]

_SECOND, _MINUTE, _HOUR, _DAY = 1_000, 60_000, 3_600_000, 86_400_000
_UNITS = {"ms": 1, "s": _SECOND, "m": _MINUTE, "h": _HOUR, "d": _DAY}
#: The fields of a wait that hold milliseconds.
_FIELDS = re.compile(r"\b(initial|maximum|scale|offset|ms)=(\d+)")


def format_duration(ms: float | None) -> str:
    """Format milliseconds: ``850 ms``, ``1.5 s``, ``2 m 5 s``, ``24 h``, ``7 d``; ``-`` for None.

    Days are used from 48 hours on.
    """
    if ms is None:
        return "-"
    if ms < _SECOND:
        return f"{ms:.0f} ms"
    if ms < _MINUTE:
        return f"{ms / _SECOND:.3g} s"
    seconds = round(ms / _SECOND)
    units = ((172_800, 86_400, "d", 3_600, "h"), (3_600, 3_600, "h", 60, "m"), (0, 60, "m", 1, "s"))
    _, size, unit, smaller, name = next(row for row in units if seconds >= row[0])
    rest = seconds % size // smaller
    return f"{seconds // size} {unit} {rest} {name}" if rest else f"{seconds // size} {unit}"


def parse_duration(text: str) -> int:
    """Read ``90s``, ``30m``, ``2h`` or ``7d``, or a number of milliseconds, as milliseconds.

    Raises:
      ValueError: The text is no duration, or is negative.
    """
    text = text.strip().lower()
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
    try:
        ms = round(float(number) * _UNITS[text[len(number) :].strip() or "ms"])
    except (KeyError, OverflowError) as error:
        raise ValueError(text) from error
    if ms < 0:
        raise ValueError(text)
    return ms


def describe_wait(declared: str) -> str:
    """Replace the milliseconds in the ``repr`` of a wait: ``exponential(initial=2 s, maximum=7 d, factor=2)``."""
    text = _FIELDS.sub(lambda found: f"{found[1]}={format_duration(int(found[2]))}", declared)
    return text.replace("constant(ms=", "constant(")
