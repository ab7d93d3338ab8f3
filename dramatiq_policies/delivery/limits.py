"""The timeout and the queue timeout of a message: from the options of the message, else of the actor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from ..common.durations import WEEK_MS, declared_ms, format_duration, looks_like_seconds, warn_of_seconds
from ..errors import ConfigurationError
from ..outcomes import logger
from .delivery import READY_AT, Delivery
from .history import POLICIES
from .validation import redacted_repr

if TYPE_CHECKING:
    from dramatiq import Message
    from dramatiq.broker import MessageProxy

__all__ = [
    "WARN_RATIO",
    "check_timeouts",
    "checked_timeout",
    "duration_ms",
    "expired_after",
    "none_if_infinite",
    "timeout_of",
    "warn_if_close",
]

#: A job that uses more than this share of its timeout is logged as a warning.
WARN_RATIO: Final = 0.8


def check_timeouts(where: str, options: Mapping[str, Any]) -> None:
    """Check an actor's timeouts; ``where`` names the actor in the error.

    Raises:
      ConfigurationError: Both ``timeout`` and ``time_limit`` are set, or a timeout is no duration.
    """
    if options.get("timeout") is not None and options.get("time_limit") is not None:
        raise ConfigurationError.of_option(
            where, "timeout", "either timeout or time_limit", {k: options[k] for k in ("timeout", "time_limit")}
        )
    for option, most in _MOST_MS.items():
        checked_timeout(where, option, options.get(option), most)


#: The options with their longest duration.
_MOST_MS: Final[dict[str, int | None]] = {"timeout": WEEK_MS, "time_limit": None, "queue_timeout": WEEK_MS}


def timeout_of(options: Mapping[str, Any], actor_timeout_ms: float | None, actor: str) -> float | None:
    """Return the timeout of one message's job in milliseconds; None for no limit.

    Parameters:
      options: The message's options: ``timeout``, else ``time_limit``, overrides the actor's. An invalid value is ignored,
        with one warning per actor and option.
      actor_timeout_ms: The actor's timeout, from `Timeout.resolve`.
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
            return none_if_infinite(limit)
        if (actor, option) not in _warned:
            _warned.add((actor, option))
            logger.warning(
                "A message of actor %s has %s=%s; expected %s. The option is ignored; this warning is logged once.",
                actor,
                option,
                redacted_repr(value),
                _expected(_MOST_MS[option]),
                extra={"actor": actor},
            )
    return actor_timeout_ms


_warned: set[tuple[str, str]] = set()


def expired_after(message: Message[Any] | MessageProxy, queue_timeout_ms: float | None, now_ms: float) -> float | None:
    """Return how long an expired message has waited for its first run, in milliseconds; None if it has not expired.

    Parameters:
      message: The option ``ready_at`` holds the time at which the message became ready, in ms since the epoch. Plain Dramatiq does
        not set the option: then the message's timestamp counts.
      queue_timeout_ms: The actor's queue timeout, from `Timeout.resolve`.
      now_ms: The time, in ms since the epoch.

    A message that ran before or was put back never expires. Nor does a message with an unreadable or future time.
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
    # A time before 1971 is a default, or seconds instead of milliseconds.
    return waited if waited > queue_timeout_ms and ready > 365 * 24 * 3_600_000 else None


def warn_if_close(delivery: Delivery) -> None:
    """Log a warning if a job ended in time but used over 80 % of its timeout."""
    limit = delivery.timeout_ms
    if limit is None:
        return
    elapsed = delivery.elapsed_ms()
    if elapsed <= WARN_RATIO * limit:
        return
    message = delivery.message
    logger.warning(
        "Job %s (message %s) ran for %s: %.0f %% of its timeout of %s. Raise the timeout, or make the job faster.",
        message.actor_name,
        message.message_id,
        format_duration(elapsed),
        elapsed / limit * 100,
        format_duration(limit),
        extra={
            "actor": message.actor_name,
            "queue": message.queue_name,
            "message_id": message.message_id,
            "duration_ms": elapsed,
            "timeout_ms": limit,
        },
    )


def duration_ms(value: object) -> float | None:
    """Return a duration in milliseconds, perhaps infinite; None if the value is no duration."""
    if isinstance(value, timedelta):
        return value / timedelta(milliseconds=1)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return None if math.isnan(value) else value


def _within(value: object, most: int | None) -> float | None:
    limit = duration_ms(value)
    if limit is None or limit <= 0 or (most is not None and most < limit < math.inf):
        return None
    return limit


def none_if_infinite(limit: float | None) -> float | None:
    """Return a limit, and None for infinity."""
    return None if limit == math.inf else limit


def _expected(most: int | None) -> str:
    bound = "more than 0" if most is None else "more than 0 and at most 7 days"
    return f'milliseconds or a timedelta, {bound}, or float("inf") for no limit'


def checked_timeout(where: str, option: str, value: object, most: int | None) -> float | None:
    """Return a declared limit in milliseconds, None if not set; log a warning if the number looks like seconds.

    Raises:
      ConfigurationError: The value is no positive duration, or longer than ``most`` milliseconds and finite.
    """
    if value is None:
        return None
    limit = _within(value, most)
    if limit is None:
        raise ConfigurationError.of_option(where, option, _expected(most), value)
    warn_of_seconds(where, option, value)
    return declared_ms(option, value) if looks_like_seconds(option, value) else limit
