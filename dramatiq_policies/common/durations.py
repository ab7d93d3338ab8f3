"""Durations are milliseconds (int), as everywhere in Dramatiq, or ``datetime.timedelta``."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

from .safe_logger import SafeLogger
from .throttle import Throttle

__all__ = [
    "CENTURY_MS",
    "WEEK_MS",
    "Duration",
    "LikelySeconds",
    "clamped_wait",
    "declared_ms",
    "format_duration",
    "looks_like_seconds",
    "seconds_hint",
    "to_ms",
    "warn_of_seconds",
    "warn_of_seconds_once",
]

logger = SafeLogger("dramatiq_policies.backoff")
rules_logger = SafeLogger("dramatiq_policies.rules")

Duration = int | timedelta

#: The longest delay that Dramatiq accepts: seven days.
WEEK_MS = 7 * 86_400_000
#: A hundred years: longer than any use, and still a valid time for every clock and store.
CENTURY_MS = 36_525 * 86_400_000


#: Below this number of milliseconds an option was probably meant in seconds: 3,600 for an hour, 86,400 for a day.
SECONDS_BELOW_MS = {
    "queue_timeout": 5_000,
    "queue_default": 5_000,
    "max_age": 5_000,
    "max_elapsed": 5_000,
    "max_snooze": 5_000,
    "idempotency_ttl": 120_000,
    "ttl": 120_000,
    "oldest": 5_000,
    "stalled": 5_000,
    "alert_interval": 5_000,
    "result_ttl": 5_000,
}
#: The threshold for all other durations.
SECOND_MS = 1_000


class LikelySeconds(int):
    """Milliseconds, declared as a number that looks like seconds. ``check`` reports such a number, and no equal ``timedelta``."""


def looks_like_seconds(option: str, value: object) -> bool:
    """Return whether a declared number looks like seconds where milliseconds are expected.

    A ``timedelta`` has its unit, and 0 has none: both are taken as declared.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 < value < SECONDS_BELOW_MS.get(option, SECOND_MS)


def seconds_hint(option: str, value: object) -> str | None:
    """Return a sentence if a declared number `looks_like_seconds`; else None."""
    if not looks_like_seconds(option, value):
        return None
    return (
        f"{option}={value!r} is {value} milliseconds. "
        f"For seconds write timedelta(seconds={value!r}); if you mean milliseconds, timedelta(milliseconds={value!r})."
    )


def warn_of_seconds(where: str, option: str, value: object) -> None:
    """Log a warning if a declared duration looks like seconds."""
    hint = seconds_hint(option, value)
    if hint is not None:
        rules_logger.warning("%s: %s", where, hint)


_warned = Throttle()


def warn_of_seconds_once(where: str, option: str, value: object) -> None:
    """Log a warning if the duration of a message or an error looks like seconds; once per process and place."""
    if looks_like_seconds(option, value) and _warned.admits((where, option), math.inf):
        warn_of_seconds(where, option, value)


def declared_ms(option: str, value: object) -> int:
    """Return a declared duration in whole milliseconds, as `LikelySeconds` if the number looks like seconds.

    Raises:
      TypeError, ValueError: As `to_ms`.
    """
    ms = to_ms(value)
    # At least 1: 0 has a meaning of its own.
    return LikelySeconds(max(1, ms)) if looks_like_seconds(option, value) else ms


def to_ms(value: object) -> int:
    """Return a duration in whole milliseconds.

    Raises:
      TypeError: The value is neither a number nor a ``timedelta``.
      ValueError: The value is negative or not finite.
    """
    if isinstance(value, timedelta):
        value = value.total_seconds() * 1_000
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected milliseconds or a timedelta, got {value!r}")
    # An int of a thousand digits is no float.
    if value < 0 or not (isinstance(value, int) or math.isfinite(value)):
        raise ValueError(f"expected a duration of at least 0 ms, got {value!r}")
    return round(value)


def clamped_wait(value: Any, whose: str, *args: object) -> int:
    """Return a wait in whole milliseconds, clamped to 0 to 7 days.

    A negative wait becomes 0, a longer or infinite wait becomes 7 days, each with a warning that begins with ``whose % args``.

    Raises:
      TypeError: The value is neither a number nor a ``timedelta``.
      ValueError: The value is not a number (NaN).
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if (is_number and value < 0) or (isinstance(value, timedelta) and value < timedelta(0)):
        logger.warning("%s is negative: the wait is 0 ms.", whose % args)
        return 0
    milliseconds = WEEK_MS + 1 if is_number and value == math.inf else to_ms(value)
    if milliseconds > WEEK_MS:
        logger.warning("%s exceeds 7 days, Dramatiq's longest delay: the wait is 7 days.", whose % args)
        return WEEK_MS
    return milliseconds


def format_duration(ms: float | None) -> str:
    """Format milliseconds for people, in logs and on the terminal: ``850 ms``, ``1.5 s``, ``2 m 5 s``, ``24 h``, ``7 d``; ``-`` for None.

    Days are used from 48 hours on.
    """
    if ms is None:
        return "-"
    if round(ms) < 1_000:
        return f"{ms:.0f} ms"
    if ms < 60_000:
        return f"{ms / 1_000:.3g} s"
    seconds = round(ms / 1_000)
    units = ((172_800, 86_400, "d", 3_600, "h"), (3_600, 3_600, "h", 60, "m"), (0, 60, "m", 1, "s"))
    _, size, unit, smaller, name = next(row for row in units if seconds >= row[0])
    rest = seconds % size // smaller
    return f"{seconds // size} {unit} {rest} {name}" if rest else f"{seconds // size} {unit}"
