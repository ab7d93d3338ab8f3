"""The wait that the other side asks for, in an attribute of the error or in a header. Pure; an unreadable time counts as none."""

from __future__ import annotations

import math
import random as _random
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta, timezone
from typing import Any

from .._job_errors import quietly
from ..common.durations import WEEK_MS, Duration
from ..errors import checked_wait
from .backoff import DeclaredWait, Random, Wait, checked_share, exponential
from .wait import as_wait, bounds_of, safe_wait

__all__ = ["parse_retry_after", "retry_after"]

#: The longest time read, over thirty years, in seconds: a number that fits every type.
_MOST = 10**9


def _now() -> datetime:
    return datetime.now(timezone.utc)


class _RetryAfter(DeclaredWait):
    declared_as = "retry_after"

    fallback: Wait
    maximum: int
    jitter: float
    random: Random | None
    now: Callable[[], datetime]

    def bounds(self, attempt: int) -> tuple[int, int]:
        # The other side may ask for no wait at all.
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
        jitter=checked_share(where, jitter),
        random=random,
        now=now,
    )


def parse_retry_after(exception: BaseException, now: Callable[[], datetime]) -> float | None:
    """Return the first readable time of ``exc.retry_after`` and the Retry-After headers of ``exc.response`` and ``exc``.

    None without a readable time. A time in the past is 0.
    """
    for value in _asked_of(exception):
        seconds = quietly(lambda value=value: _bounded(_seconds(value, now)))  # type: ignore[misc]
        if seconds is not None:
            return seconds
    return None


def _asked_of(exception: BaseException) -> Iterable[Any]:
    yield quietly(lambda: exception.retry_after)  # type: ignore[attr-defined]
    yield quietly(lambda: _header(exception.response.headers))  # type: ignore[attr-defined]
    yield quietly(lambda: _header(exception.headers))  # type: ignore[attr-defined]


def _http_date(text: str) -> datetime:
    from email.utils import parsedate_to_datetime  # costs a fifth of importing this package

    return parsedate_to_datetime(text.strip())


def _bounded(seconds: float | None) -> float | None:
    return None if seconds is None else max(0.0, min(seconds, _MOST))


def _header(headers: Any) -> Any:
    items = headers.items() if hasattr(headers, "items") else headers
    for name, value in items:
        text = name.decode("latin-1") if isinstance(name, bytes) else name
        if isinstance(text, str) and text.lower() == "retry-after":
            return value
    return None


def _seconds(value: object, now: Callable[[], datetime]) -> float | None:
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if isinstance(value, str):
        try:
            # More digits than a float holds are a long time, not infinity.
            value = float(value) if "inf" in value.lower() else min(float(value), _MOST)
        except ValueError:
            value = quietly(lambda text=value: _http_date(text))  # type: ignore[misc]
    if isinstance(value, bool):
        return None
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, datetime):
        when = value if value.tzinfo is not None else value.replace(tzinfo=timezone.utc)
        left: timedelta | None = quietly(lambda: when - now())
        return None if left is None else left.total_seconds()
    if isinstance(value, (int, float)):
        # An int may exceed the range of floats.
        return None if isinstance(value, float) and not math.isfinite(value) else value
    return None
