"""Read durations of people, and print waits: ``850 ms``, ``20 s``, ``24 h``, ``7 d``."""

from __future__ import annotations

import re

from ..common.durations import format_duration

__all__ = ["describe_wait", "parse_duration"]

_UNITS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
#: The fields of a wait that hold milliseconds.
_FIELDS = re.compile(r"\b(initial|maximum|scale|offset|ms)=(\d+)")


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
