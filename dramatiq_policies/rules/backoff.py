"""Waits before the next attempt: pure functions of the attempt and the error.

A wait is any ``callable(attempt, exception) -> ms``; attempt is 1 at the rule's first failure. The waits in this module add
jitter upward only, as a share of the wait, so that a wait is never shorter than declared (see "Exponential Backoff And Jitter",
AWS Architecture Blog). The longest wait is seven days, the longest delay that Dramatiq accepts. Waits are immutable values that
compare, print and pickle by their arguments; ``bounds(attempt)`` returns the shortest and the longest wait.
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
from ..common.durations import WEEK_MS, Duration, clamped_wait, to_ms, warn_of_seconds_once
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

#: Takes the rule's own count and the error; returns milliseconds (or a timedelta) until the next attempt.
Wait = Callable[[int, BaseException], "int | float | timedelta"]
Random = Callable[[], float]


class _Declared:
    """A frozen value that prints as declared, for `explain` and for logs.

    No dataclass: a dataclass compiles its methods at each import, and every worker imports this module.
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
    """A wait that grows with the attempt, up to ``maximum`` before jitter."""

    maximum: int
    jitter: float
    random: Random | None

    def base(self, attempt: int) -> float:
        raise NotImplementedError

    def bounds(self, attempt: int) -> tuple[int, int]:
        """Return the shortest and the longest wait at this attempt, in milliseconds."""
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
        """Return the wait as the shortest and as the longest."""
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
    """Wait ``initial``, then ``factor`` times longer after each failure, up to ``maximum``.

    Two seconds, four, eight, sixteen, then at most a minute::

        RetryPolicy(attempts=8, wait=exponential(initial=timedelta(seconds=2), maximum=timedelta(minutes=1)))

    Parameters:
      initial: The wait after the first failure, in milliseconds or as a ``timedelta``. Default 15 seconds, as in Dramatiq.
      maximum: The longest wait before jitter, in milliseconds or as a ``timedelta``. Default seven days.
      factor: Each wait is this many times the one before, at least 1. Default 2.
      jitter: The largest share of the wait that is added at random, 0 to 1. Default 0.15.
      random: The source of randomness, a callable that returns 0 to 1.

    Raises:
      ConfigurationError: An argument is out of its range.
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
    """Wait ``offset`` + ``scale`` * attempt ^ ``power``; the defaults are those of Active Job's ``polynomially_longer``.

    Three seconds, 18, 83, 258 …::

        RetryPolicy(attempts=10, wait=polynomial())

    Parameters:
      power: The exponent. Default 4.
      scale: In milliseconds or as a ``timedelta``. Default 1 second.
      offset: In milliseconds or as a ``timedelta``. Default 2 seconds.
      maximum: The longest wait before jitter, in milliseconds or as a ``timedelta``. Default seven days.
      jitter: The largest share of the wait that is added at random, 0 to 1. Default 0.15.
      random: The source of randomness, a callable that returns 0 to 1.

    Raises:
      ConfigurationError: An argument is out of its range.
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
    """Always wait the same time, without jitter::

        RetryPolicy(attempts=4, wait=constant(timedelta(seconds=30)))

    Parameters:
      ms: The wait, in milliseconds or as a ``timedelta``.

    Raises:
      ConfigurationError: ``ms`` is no duration.
    """
    return _Constant(ms=checked_wait("constant()", "ms", ms))


def _now() -> datetime:
    return datetime.now(timezone.utc)


class _RetryAfter(_Declared):
    declared_as = "retry_after"

    fallback: Wait
    maximum: int
    jitter: float
    random: Random | None
    now: Callable[[], datetime]

    def bounds(self, attempt: int) -> tuple[int, int]:
        """Return the shortest and the longest wait at this attempt; the other side may ask for no wait at all."""
        return 0, max(self._with_jitter(min(self.maximum, WEEK_MS), 1.0), bounds_of(self.fallback, attempt)[1])

    def _with_jitter(self, wait: float, share: float) -> int:
        return min(WEEK_MS, math.ceil(wait * (1 + self.jitter * share)))

    def __call__(self, attempt: int, exception: BaseException) -> int:
        seconds = parse_retry_after(exception, self.now)
        if seconds is None:
            return safe_wait(self.fallback, attempt, exception)
        # Rounded up: never earlier than the server asks for.
        wait = min(self.maximum, WEEK_MS, math.ceil(seconds * 1_000))
        return self._with_jitter(wait, (self.random or _random.random)())


def retry_after(
    fallback: Wait | Duration | None = None,
    maximum: Duration = 3_600_000,
    jitter: float = 0.15,
    *,
    random: Random | None = None,
    now: Callable[[], datetime] = _now,
) -> _RetryAfter:
    """Wait as long as the other side asks for, in ``exc.retry_after`` or a Retry-After header (RFC 9110, 10.2.3).

    For a rate-limited service::

        RetryPolicy(attempts=10, wait=retry_after(fallback=exponential(initial=timedelta(seconds=1))))

    ``exc.retry_after`` may be seconds, a ``timedelta``, a ``datetime`` (naive: UTC) or a header's value. The header is read from
    ``exc.response.headers`` and ``exc.headers``. A time in the past is no wait. Jitter lengthens the wait and spreads the
    messages, which otherwise would all come back at the same moment.

    Parameters:
      fallback: The wait if the error names no readable time, or a constant duration. Default ``exponential()``.
      maximum: The longest wait before jitter, in milliseconds or as a ``timedelta``. Default an hour; at most seven days.
      jitter: The largest share of the wait that is added at random, 0 to 1. Default 0.15.
      random: The source of randomness, a callable that returns 0 to 1.
      now: The clock.

    Raises:
      ConfigurationError: An argument is out of its range.
    """
    where = "retry_after()"
    chosen = exponential() if fallback is None else as_wait(where, "fallback", fallback)
    return _RetryAfter(
        fallback=chosen,
        maximum=checked_wait(where, "maximum", maximum),
        jitter=_share(where, jitter),
        random=random,
        now=now,
    )


def as_wait(where: str, option: str, value: Any) -> Wait:
    """Return a declared wait; a duration becomes a constant wait.

    Raises:
      ConfigurationError: The value is neither a duration nor a plain callable with two arguments.
    """
    if isinstance(value, (int, float, timedelta)):
        return _Constant(ms=checked_wait(where, option, value))
    if not is_sync_callable(value, 2):
        raise ConfigurationError.of_option(
            where, option, "a wait, a plain callable(attempt, exception) -> ms, or milliseconds", value
        )
    wait: Wait = value
    return wait


def bounds_of(wait: object, attempt: int) -> tuple[int, int]:
    """Return the shortest and the longest wait at this attempt, in milliseconds; a user's callable may return any wait."""
    return wait.bounds(attempt) if isinstance(wait, (_Growing, _Constant, _RetryAfter)) else (0, WEEK_MS)


def safe_wait(wait: Wait, attempt: int, exception: BaseException) -> int:
    """Call a wait, and return whole milliseconds, at most seven days; log a longer wait, and a user's that looks like seconds.

    If the wait raises or returns no duration, log the error and use `exponential`.
    """
    try:
        chosen = wait(attempt, exception)
        if not isinstance(wait, _Declared):
            warn_of_seconds_once(f"The wait {wait!r}", "wait", chosen)
        return clamped_wait(to_ms(chosen), "The wait %r at attempt %d", wait, attempt)
    except BaseException:  # User code may raise SystemExit; see `_job_errors`.
        logger.exception("The wait %r raised an error at attempt %d; the job waits by exponential().", wait, attempt)
        return _FALLBACK(attempt, exception)


def _number(where: str, name: str, value: object, least: float) -> float:
    # An int can be finite and beyond what a float holds.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= sys.float_info.max:
        raise ConfigurationError.of_option(where, name, f"a number of at least {least}", value)
    return value


def _share(where: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigurationError.of_option(where, "jitter", "a share from 0 to 1", value)
    return value


_FALLBACK = exponential()
