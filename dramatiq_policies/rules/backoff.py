"""How long to wait before the next attempt: pure functions of the attempt and the error.

A wait is any ``callable(attempt, exception) -> ms``; attempt is 1 at the rule's first failure. Those here add jitter
upward only, as a share of the wait, so that a wait is never shorter than it says (see "Exponential Backoff And Jitter",
AWS Architecture Blog). All are bounded by the seven days that Dramatiq can delay a message for. They are immutable
values, which compare, print and pickle as what was declared; ``bounds(attempt)`` says what they may come to.
"""

from __future__ import annotations

import math
import random as _random
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from datetime import datetime, timedelta, timezone
from typing import Any, ClassVar

from ..common.callables import is_sync_callable
from ..common.durations import WEEK_MS, Duration, clamped_wait, to_ms
from ..common.safe_logger import SafeLogger
from ..errors import ConfigurationError, checked_wait
from .retry_after import parse_retry_after

__all__ = [
    "Wait",
    "as_wait",
    "bounds_of",
    "constant",
    "exponential",
    "polynomial",
    "retry_after",
    "safe_wait",
]

logger = SafeLogger("dramatiq_policies.backoff")

#: Given the rule's own count and the error, milliseconds (or a timedelta) until the next attempt.
Wait = Callable[[int, BaseException], "int | float | timedelta"]
Random = Callable[[], float]


class _Declared:
    """Frozen, and prints as it was declared, for `explain` and for logs.

    No dataclass, like all of ours that every worker imports and no user handles: it compiles its methods at each import.
    """

    declared_as: ClassVar[str]

    def __init__(self, **declared: Any) -> None:
        vars(self).update(declared)

    def _shown(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("random", "now")}

    def __repr__(self) -> str:
        return f"{self.declared_as}({', '.join(f'{name}={value!r}' for name, value in self._shown().items())})"

    def __eq__(self, other: object) -> bool:
        return self._shown() == other._shown() if isinstance(other, type(self)) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self._shown().values()))

    def __setattr__(self, name: str, value: object) -> None:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"cannot delete field {name!r}")


class _Growing(_Declared):
    """A wait that grows with the attempt, bounded by ``maximum`` before jitter."""

    maximum: int
    jitter: float
    random: Random | None

    def base(self, attempt: int) -> float:
        raise NotImplementedError

    def bounds(self, attempt: int) -> tuple[int, int]:
        """The shortest and the longest wait at this attempt, in milliseconds."""
        most = min(self.maximum, WEEK_MS)
        try:
            base = min(self.base(max(1, attempt)), most)
        except OverflowError:
            base = most
        return round(base), min(round(base * (1 + self.jitter)), WEEK_MS)

    def __call__(self, attempt: int, exception: BaseException) -> int:
        shortest, longest = self.bounds(attempt)
        return shortest + round((longest - shortest) * (self.random or _random.random)())


class _Exponential(_Growing):
    declared_as = "exponential"

    initial: int
    maximum: int
    factor: float
    jitter: float

    def base(self, attempt: int) -> float:
        return self.initial * float(self.factor) ** (attempt - 1) if self.initial else 0


class _Polynomial(_Growing):
    declared_as = "polynomial"

    power: float
    scale: int
    offset: int
    maximum: int
    jitter: float

    def base(self, attempt: int) -> float:
        return self.offset + (self.scale * float(attempt) ** self.power if self.scale else 0)


class _Constant(_Declared):
    declared_as = "constant"

    ms: int

    def bounds(self, attempt: int) -> tuple[int, int]:
        """The wait, twice."""
        wait = min(self.ms, WEEK_MS)
        return wait, wait

    def __call__(self, attempt: int, exception: BaseException) -> int:
        return min(self.ms, WEEK_MS)


def exponential(
    initial: Duration = 15_000,
    maximum: Duration = WEEK_MS,
    factor: float = 2,
    jitter: float = 0.15,
    *,
    random: Random | None = None,
) -> _Exponential:
    """``initial`` * ``factor`` ^ (attempt - 1).

    Parameters:
      initial: The wait after the first failure, in milliseconds. Default 15 seconds, Dramatiq's own.
      maximum: The longest wait before jitter, in milliseconds. Default seven days.
      factor: What each further wait is multiplied by, at least 1. Default 2.
      jitter: The share of the wait that is added at random, 0 to 1. Default 0.15.
      random: The source of randomness, a callable that returns 0 to 1.

    Raises:
      ConfigurationError: If an argument is out of its range.
    """
    where = "exponential()"
    return _Exponential(
        initial=checked_wait(where, "initial", initial),
        maximum=checked_wait(where, "maximum", maximum),
        factor=_number(where, "factor", factor, 1),
        jitter=_share(where, jitter),
        random=random,
    )


def polynomial(
    power: float = 4,
    scale: Duration = 1_000,
    offset: Duration = 2_000,
    maximum: Duration = WEEK_MS,
    jitter: float = 0.15,
    *,
    random: Random | None = None,
) -> _Polynomial:
    """``offset`` + ``scale`` * attempt ^ ``power``: Active Job's ``polynomially_longer`` with its defaults.

    Parameters:
      power: The exponent. Default 4.
      scale: In milliseconds. Default 1,000.
      offset: In milliseconds. Default 2,000.
      maximum: The longest wait before jitter, in milliseconds. Default seven days.
      jitter: The share of the wait that is added at random, 0 to 1. Default 0.15.
      random: The source of randomness, a callable that returns 0 to 1.

    Raises:
      ConfigurationError: If an argument is out of its range.
    """
    where = "polynomial()"
    return _Polynomial(
        power=_number(where, "power", power, 0),
        scale=checked_wait(where, "scale", scale),
        offset=checked_wait(where, "offset", offset),
        maximum=checked_wait(where, "maximum", maximum),
        jitter=_share(where, jitter),
        random=random,
    )


def constant(ms: Duration) -> _Constant:
    """Always the same wait, in milliseconds or as a ``timedelta``.

    Raises:
      ConfigurationError: If it is no duration.
    """
    return _Constant(ms=checked_wait("constant()", "ms", ms))


def _now() -> datetime:
    return datetime.now(timezone.utc)


class _RetryAfter(_Declared):
    declared_as = "retry_after"

    fallback: Wait
    maximum: int
    now: Callable[[], datetime]

    def bounds(self, attempt: int) -> tuple[int, int]:
        """The shortest and the longest wait at this attempt: the other side may ask for none at all."""
        return 0, max(min(self.maximum, WEEK_MS), bounds_of(self.fallback, attempt)[1])

    def __call__(self, attempt: int, exception: BaseException) -> int:
        seconds = parse_retry_after(exception, self.now)
        if seconds is None:
            return safe_wait(self.fallback, attempt, exception)
        # Rounded up: a server that says two seconds means no less.
        return min(self.maximum, WEEK_MS, math.ceil(seconds * 1_000))


def retry_after(
    fallback: Wait | Duration | None = None,
    maximum: Duration = 3_600_000,
    *,
    now: Callable[[], datetime] = _now,
) -> _RetryAfter:
    """As long as the other side asked for, in ``exc.retry_after`` or a Retry-After header (RFC 9110, 10.2.3).

    ``exc.retry_after`` may be seconds, a ``timedelta``, a ``datetime`` (naive: UTC) or a header's value; the header is
    looked for in ``exc.response.headers`` and ``exc.headers``. A time that has passed is no wait at all.

    Parameters:
      fallback: The wait where nothing readable is said, or a constant one. Default ``exponential()``.
      maximum: The longest wait that is granted, in milliseconds. Default an hour.
      now: The clock.

    Raises:
      ConfigurationError: If an argument is out of its range.
    """
    where = "retry_after()"
    chosen = exponential() if fallback is None else as_wait(where, "fallback", fallback)
    return _RetryAfter(fallback=chosen, maximum=checked_wait(where, "maximum", maximum), now=now)


def as_wait(where: str, option: str, value: Any) -> Wait:
    """What was declared as a wait, a bare duration as a constant one.

    Raises:
      ConfigurationError: If it is neither a duration nor a plain callable that takes two arguments.
    """
    if isinstance(value, (int, float, timedelta)):
        return _Constant(ms=checked_wait(where, option, value))
    if not is_sync_callable(value, 2):
        raise ConfigurationError.of_option(
            where, option, "a wait, a plain callable(attempt, exception) -> ms, or milliseconds", value
        )
    wait: Wait = value
    return wait


def bounds_of(wait: Any, attempt: int) -> tuple[int, int]:
    """The shortest and the longest wait at this attempt, in milliseconds; a callable of the user's may say anything."""
    return wait.bounds(attempt) if isinstance(wait, (_Growing, _Constant, _RetryAfter)) else (0, WEEK_MS)


def safe_wait(wait: Wait, attempt: int, exception: BaseException) -> int:
    """What the wait says, in whole milliseconds, at most seven days; a longer one is logged.

    One that raises or returns rubbish is logged, and `exponential` taken instead.
    """
    try:
        return clamped_wait(to_ms(wait(attempt, exception)), f"The wait {wait!r} at attempt {attempt}")
    except BaseException:  # Not even an exit: see `user_errors`.
        logger.exception("The wait %r failed at attempt %d; exponential() is taken instead.", wait, attempt)
        return _FALLBACK(attempt, exception)


def _number(where: str, name: str, value: Any, least: float) -> float:
    # An int can be finite and beyond what a float holds.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= sys.float_info.max:
        raise ConfigurationError.of_option(where, name, f"a number of at least {least}", value)
    return value


def _share(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigurationError.of_option(where, "jitter", "a share from 0 to 1", value)
    return value


_FALLBACK = exponential()
