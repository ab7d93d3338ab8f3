"""Durations are milliseconds (int), as everywhere in Dramatiq, or ``datetime.timedelta``."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

__all__ = ["CENTURY_MS", "WEEK_MS", "Duration", "to_ms"]

Duration = int | timedelta

#: The longest delay that Dramatiq takes: seven days.
WEEK_MS = 7 * 86_400_000
#: A hundred years: what anybody may mean by "for ever", and still a time for every clock and store.
CENTURY_MS = 36_525 * 86_400_000


def to_ms(value: Any) -> int:
    """The duration in whole milliseconds.

    Raises:
      TypeError: If it is neither a number nor a ``timedelta``.
      ValueError: If it is negative or not finite.
    """
    if isinstance(value, timedelta):
        value = value.total_seconds() * 1_000
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected milliseconds or a timedelta, got {value!r}")
    # An int of a thousand digits is no float.
    if value < 0 or not (isinstance(value, int) or math.isfinite(value)):
        raise ValueError(f"expected a duration of at least 0 ms, got {value!r}")
    return round(value)
