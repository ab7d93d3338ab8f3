"""Durations are milliseconds (int), as everywhere in Dramatiq, or ``datetime.timedelta``."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

from .safe_logger import SafeLogger

__all__ = ["CENTURY_MS", "WEEK_MS", "Duration", "clamped_wait", "to_ms"]

logger = SafeLogger("dramatiq_policies.backoff")

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


def clamped_wait(value: Any, whose: str) -> int:
    """A wait in whole milliseconds, from 0 to 7 days: the one place where waits are clamped.

    A negative wait becomes 0, a longer or infinite wait becomes 7 days, each with a warning that begins with ``whose``.

    Raises:
      TypeError: The value is neither a number nor a ``timedelta``.
      ValueError: The value is not a number (NaN).
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if (is_number and value < 0) or (isinstance(value, timedelta) and value < timedelta(0)):
        logger.warning("%s is a negative wait: the wait is 0 ms.", whose)
        return 0
    milliseconds = WEEK_MS + 1 if is_number and value == math.inf else to_ms(value)
    if milliseconds > WEEK_MS:
        logger.warning("%s is a wait of more than 7 days, the longest that Dramatiq delays for: it is 7 days.", whose)
        return WEEK_MS
    return milliseconds
