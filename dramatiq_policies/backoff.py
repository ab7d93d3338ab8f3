"""How long to wait before the next attempt: pure functions of the attempt and the error.

A wait is any ``callable(attempt, exception) -> ms``; attempt is 1 at the rule's first failure. Those here add jitter
upward only, as a share of the wait, so that a wait is never shorter than it says (see "Exponential Backoff And Jitter",
AWS Architecture Blog). All are bounded by the seven days that Dramatiq can delay a message for.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import random as _random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from typing import Any

from .durations import WEEK_MS, Duration, to_ms
from .errors import ConfigurationError

__all__ = ["Wait", "constant", "exponential", "is_coroutine_callable", "polynomial", "retry_after", "safe_wait"]

logger = logging.getLogger("dramatiq_policies.backoff")

#: Given the rule's own count and the error, milliseconds (or a timedelta) until the next attempt.
Wait = Callable[[int, BaseException], "int | float | timedelta"]
Random = Callable[[], float]


@dataclass(frozen=True, slots=True)
class _Jittered:
    """A wait that grows with the attempt, bounded by ``maximum`` before jitter."""

    maximum: int
    jitter: float
    random: Random | None = field(default=None, compare=False, repr=False, kw_only=True)

    def base(self, attempt: int) -> float:
        raise NotImplementedError

    def bounds(self, attempt: int) -> tuple[int, int]:
        """The shortest and the longest wait at this attempt, in milliseconds."""
        try:
            base = min(self.base(max(1, attempt)), self.maximum)
        except OverflowError:
            base = self.maximum
        return min(round(base), WEEK_MS), min(round(base * (1 + self.jitter)), WEEK_MS)

    def __call__(self, attempt: int, exception: BaseException) -> int:
        shortest, longest = self.bounds(attempt)
        if shortest == longest:
            return shortest
        return shortest + round((longest - shortest) * (self.random or _random.random)())


@dataclass(frozen=True, slots=True)
class _Exponential(_Jittered):
    initial: int = field(kw_only=True)
    factor: float = field(kw_only=True)

    def base(self, attempt: int) -> float:
        return self.initial * float(self.factor) ** (attempt - 1) if self.initial else 0


@dataclass(frozen=True, slots=True)
class _Polynomial(_Jittered):
    power: float = field(kw_only=True)
    scale: int = field(kw_only=True)
    offset: int = field(kw_only=True)

    def base(self, attempt: int) -> float:
        return self.offset + (self.scale * float(attempt) ** self.power if self.scale else 0)


@dataclass(frozen=True, slots=True)
class _Constant:
    ms: int

    def bounds(self, attempt: int) -> tuple[int, int]:
        return self.ms, self.ms

    def __call__(self, attempt: int, exception: BaseException) -> int:
        return self.ms


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
        _duration(where, "maximum", maximum),
        _share(where, jitter),
        random=random,
        initial=_duration(where, "initial", initial),
        factor=_number(where, "factor", factor, 1),
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
        _duration(where, "maximum", maximum),
        _share(where, jitter),
        random=random,
        power=_number(where, "power", power, 0),
        scale=_duration(where, "scale", scale),
        offset=_duration(where, "offset", offset),
    )


def constant(ms: Duration) -> _Constant:
    """Always the same wait, in milliseconds or as a ``timedelta``.

    Raises:
      ConfigurationError: If it is no duration.
    """
    return _Constant(_duration("constant()", "ms", ms))


@dataclass(frozen=True, slots=True)
class _RetryAfter:
    fallback: Wait
    maximum: int
    now: Callable[[], datetime] = field(compare=False, repr=False)

    def __call__(self, attempt: int, exception: BaseException) -> int:
        for value in _asked_of(exception):
            wait = self._wait(value)
            if wait is not None:
                return wait
        return safe_wait(self.fallback, attempt, exception)

    def _wait(self, value: Any) -> int | None:
        seconds = _seconds(value, self.now)
        if seconds is None or math.isnan(seconds):
            return None
        # Rounded up: a server that says two seconds means no less.
        return min(self.maximum, math.ceil(max(0.0, min(seconds, 1e9)) * 1_000))


def retry_after(
    fallback: Wait | Duration | None = None,
    maximum: Duration = 3_600_000,
    *,
    now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
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
    if fallback is None:
        fallback = exponential()
    elif isinstance(fallback, (int, float, timedelta)):
        fallback = _Constant(_duration(where, "fallback", fallback))
    if not callable(fallback) or is_coroutine_callable(fallback):
        raise ConfigurationError.of_option(
            where, "fallback", "a wait, a plain callable(attempt, exception) -> ms, or milliseconds", fallback
        )
    return _RetryAfter(fallback, _duration(where, "maximum", maximum), now)


def _asked_of(exception: BaseException) -> Iterable[Any]:
    yield _quietly(lambda: exception.retry_after)  # type: ignore[attr-defined]
    yield _quietly(lambda: _header(exception.response.headers))  # type: ignore[attr-defined]
    yield _quietly(lambda: _header(exception.headers))  # type: ignore[attr-defined]


def _quietly(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception:
        return None


def _header(headers: Any) -> Any:
    items = headers.items() if isinstance(headers, Mapping) or hasattr(headers, "items") else headers
    for name, value in items:
        text = name.decode("latin-1") if isinstance(name, bytes) else name
        if isinstance(text, str) and text.lower() == "retry-after":
            return value
    return None


def _seconds(value: Any, now: Callable[[], datetime]) -> float | None:
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            value = _quietly(lambda text=value: parsedate_to_datetime(text.strip()))  # type: ignore[misc]
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, datetime):
        when = value if value.tzinfo is not None else value.replace(tzinfo=timezone.utc)
        left: timedelta | None = _quietly(lambda: when - now())
        return None if left is None else left.total_seconds()
    if isinstance(value, (int, float)):
        if isinstance(value, float) and math.isinf(value):
            return None
        return float(max(0, min(value, 10**9)))
    return None


def safe_wait(wait: Wait, attempt: int, exception: BaseException) -> int:
    """What the wait says, in whole milliseconds, at most seven days.

    One that raises or returns rubbish is logged, and `exponential` taken instead.
    """
    try:
        return min(to_ms(wait(attempt, exception)), WEEK_MS)
    except Exception:
        logger.exception("The wait %r failed at attempt %d; exponential() is taken instead.", wait, attempt)
        return _FALLBACK(attempt, exception)


def is_coroutine_callable(fn: Any) -> bool:
    """Whether calling it gives a coroutine: also for partials and objects with an async ``__call__``."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(
        getattr(type(fn), "__call__", None)  # noqa: B004 - not whether it can be called
    )


def _duration(where: str, name: str, value: Any) -> int:
    try:
        return to_ms(value)
    except (TypeError, ValueError):
        raise ConfigurationError.of_option(
            where, name, "at least 0 milliseconds, or a timedelta", value, "Durations are never seconds"
        ) from None


def _number(where: str, name: str, value: Any, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
        raise ConfigurationError.of_option(where, name, f"a number of at least {least}", value)
    return value


def _share(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigurationError.of_option(where, "jitter", "a share from 0 to 1", value)
    return value


_FALLBACK = exponential()
