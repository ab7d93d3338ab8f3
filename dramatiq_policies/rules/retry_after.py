"""Read from an error how many seconds the other side asks us to wait. Pure; an unreadable time counts as none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta, timezone
from typing import Any

from .._job_errors import quietly

__all__ = ["parse_retry_after"]

#: The longest time read, over thirty years, in seconds: a number that fits every type.
_MOST = 10**9


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
