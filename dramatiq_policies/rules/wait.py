"""Use a wait of any origin, also a user's callable: check it, show its bounds, call it safely."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from ..common.callables import is_sync_callable
from ..common.durations import WEEK_MS, clamped_wait, to_ms, warn_of_seconds_once
from ..common.safe_logger import SafeLogger
from ..errors import ConfigurationError
from .backoff import DeclaredWait, Wait, constant_of, exponential

__all__ = ["as_wait", "bounds_of", "safe_wait"]

logger = SafeLogger("dramatiq_policies.backoff")

_FALLBACK = exponential()


def as_wait(where: str, option: str, value: Any) -> Wait:
    """Return a declared wait; a duration becomes a constant wait.

    Raises:
      ConfigurationError: The value is neither a duration nor a plain callable with two arguments.
    """
    if isinstance(value, (int, float, timedelta)):
        return constant_of(where, option, value)
    if not is_sync_callable(value, 2):
        raise ConfigurationError.of_option(
            where, option, "a wait, a plain callable(attempt, exception) -> ms, or milliseconds", value
        )
    wait: Wait = value
    return wait


def bounds_of(wait: object, attempt: int) -> tuple[int, int]:
    """Return the shortest and the longest wait at this attempt, in milliseconds; a user's callable may return any wait."""
    return wait.bounds(attempt) if isinstance(wait, DeclaredWait) else (0, WEEK_MS)


def safe_wait(wait: Wait, attempt: int, exception: BaseException) -> int:
    """Call a wait, and return whole milliseconds, at most seven days; log a longer wait, and a user's that looks like seconds.

    If the wait raises or returns no duration, log the error and use `exponential`.
    """
    try:
        chosen = wait(attempt, exception)
        if not isinstance(wait, DeclaredWait):
            warn_of_seconds_once(f"The wait {wait!r}", "wait", chosen)
        return clamped_wait(to_ms(chosen), "The wait %r at attempt %d", wait, attempt)
    except BaseException:  # User code may raise SystemExit; see `_job_errors`.
        logger.exception("The wait %r raised an error at attempt %d; the job waits by exponential().", wait, attempt)
        return _FALLBACK(attempt, exception)
