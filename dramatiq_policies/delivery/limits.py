"""How long a job may run, and how long a message may wait for its first run: as its actor and its message say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from ..common.durations import WEEK_MS, warn_of_seconds
from ..errors import ConfigurationError
from ..outcomes import logger
from .delivery import READY_AT, Delivery
from .history import POLICIES
from .validation import redacted_repr

if TYPE_CHECKING:
    from dramatiq import Message
    from dramatiq.broker import MessageProxy

__all__ = ["WARN_RATIO", "checked", "expired_after", "finite", "limit_for", "milliseconds", "validate", "warn_if_close"]

#: The share of its timeout that a job may use before it is warned of.
WARN_RATIO: Final = 0.8


def validate(where: str, options: Mapping[str, Any]) -> None:
    """Check an actor's options; ``where`` names it in the error.

    Raises:
      ConfigurationError: ``timeout`` beside ``time_limit``, or one of them or ``queue_timeout`` that is no duration.
    """
    if options.get("timeout") is not None and options.get("time_limit") is not None:
        raise ConfigurationError.of_option(
            where, "timeout", "either timeout or time_limit", {k: options[k] for k in ("timeout", "time_limit")}
        )
    for option, most in _MOST_MS.items():
        checked(where, option, options.get(option), most)


#: The options, and the longest that each may be.
_MOST_MS: Final[dict[str, int | None]] = {"timeout": WEEK_MS, "time_limit": None, "queue_timeout": WEEK_MS}


def limit_for(options: Mapping[str, Any], actor_timeout_ms: float | None, actor: str) -> float | None:
    """How long one message's job may run, in milliseconds, None for no limit.

    Parameters:
      options: The message's. Its ``timeout``, else its ``time_limit``, counts if it is a duration; otherwise it is
        ignored, with one warning per actor and option.
      actor_timeout_ms: As `Timeout.resolve` says.
      actor: The actor's name.
    """
    if "timeout" not in options and "time_limit" not in options:
        return actor_timeout_ms
    for option in ("timeout", "time_limit"):
        value = options.get(option)
        if value is None:
            continue
        limit = _within(value, _MOST_MS[option])
        if limit is not None:
            return finite(limit)
        if (actor, option) not in _warned:
            _warned.add((actor, option))
            logger.warning(
                "A message of actor %s has %s=%s, which is not %s; it is ignored, here and from now on.",
                actor,
                option,
                redacted_repr(value),
                _expected(_MOST_MS[option]),
                extra={"actor": actor},
            )
    return actor_timeout_ms


_warned: set[tuple[str, str]] = set()


def expired_after(message: Message[Any] | MessageProxy, queue_timeout_ms: float | None, now_ms: float) -> float | None:
    """How long a message has waited for its first run, in milliseconds, if that is longer than it may; else None.

    Parameters:
      message: Its option ``ready_at`` says since when it is ready, in ms since the epoch. A message without it was
        enqueued by stock Dramatiq, and is ready since it was made.
      queue_timeout_ms: As `Timeout.resolve` says.
      now_ms: The time, in ms since the epoch.

    A message that was run before, or put back, never expires, nor does one whose clock is ahead of ours or unreadable.
    """
    if queue_timeout_ms is None:
        return None
    options = message.options
    if options.get("retries") or options.get(POLICIES):
        return None
    ready = options.get(READY_AT)
    if ready is None:
        ready = message.message_timestamp
    if type(ready) not in (int, float):
        return None
    waited: float = now_ms - ready
    # Ready before 1971 is no time but a default, or seconds for milliseconds.
    return waited if waited > queue_timeout_ms and ready > 365 * 24 * 3_600_000 else None


def warn_if_close(delivery: Delivery) -> None:
    """Warn if a job that has ended, and was not timed out, used over 80 % of its timeout."""
    limit = delivery.timeout_ms
    if limit is None:
        return
    elapsed = delivery.elapsed_ms()
    if elapsed <= WARN_RATIO * limit:
        return
    message = delivery.message
    logger.warning(
        "The job %s (message %s) ran for %.0f ms, %.0f %% of its timeout of %.0f ms.",
        message.actor_name,
        message.message_id,
        elapsed,
        elapsed / limit * 100,
        limit,
        extra={
            "actor": message.actor_name,
            "queue": message.queue_name,
            "message_id": message.message_id,
            "duration_ms": elapsed,
            "timeout_ms": limit,
        },
    )


def milliseconds(value: Any) -> float | None:
    """A duration as a finite or infinite number of milliseconds; None if it is none."""
    if isinstance(value, timedelta):
        return value / timedelta(milliseconds=1)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return None if math.isnan(value) else value


def _within(value: Any, most: int | None) -> float | None:
    limit = milliseconds(value)
    if limit is None or limit <= 0 or (most is not None and most < limit < math.inf):
        return None
    return limit


def finite(limit: float | None) -> float | None:
    """A limit, with None in place of infinity."""
    return None if limit == math.inf else limit


def _expected(most: int | None) -> str:
    bound = "more than 0" if most is None else "more than 0 and at most 7 days"
    return f'milliseconds or a timedelta, {bound}, or float("inf") for no limit'


def checked(where: str, option: str, value: Any, most: int | None) -> float | None:
    """A limit in milliseconds, None if none was given.

    Raises:
      ConfigurationError: It is no duration of more than 0, or a finite one of more than ``most`` milliseconds.
    """
    if value is None:
        return None
    limit = _within(value, most)
    if limit is None:
        raise ConfigurationError.of_option(where, option, _expected(most), value)
    warn_of_seconds(where, option, value)
    return limit
