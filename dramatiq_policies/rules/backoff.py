"""Waits by the number of the attempt: exponential, polynomial, constant. Pure.

A wait is any ``callable(attempt, exception) -> ms``; attempt is 1 at the rule's first failure. The waits of this package add
jitter upward only, as a share of the wait, so that a wait is never shorter than declared (see "Exponential Backoff And Jitter",
AWS Architecture Blog). The longest wait is seven days, the longest delay that Dramatiq accepts. Waits are immutable values that
compare, print and pickle by their arguments; ``bounds(attempt)`` returns the shortest and the longest wait.
"""

from __future__ import annotations

import random as _random
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from datetime import timedelta
from typing import Any, ClassVar

from ..common.durations import WEEK_MS, Duration
from ..errors import ConfigurationError, checked_wait

__all__ = [
    "DeclaredWait",
    "Random",
    "Wait",
    "checked_number",
    "checked_share",
    "constant",
    "constant_of",
    "exponential",
    "polynomial",
]

#: Takes the rule's own count and the error; returns milliseconds (or a timedelta) until the next attempt.
Wait = Callable[[int, BaseException], "int | float | timedelta"]
Random = Callable[[], float]


class DeclaredWait:
    """A wait of this package: a frozen value that prints as declared, for `explain` and for logs.

    No dataclass: a dataclass compiles its methods at each import, and every worker imports this module.
    """

    declared_as: ClassVar[str]

    def __init__(self, **declared: Any) -> None:
        vars(self).update(declared)

    def __call__(self, attempt: int, exception: BaseException) -> int:
        raise NotImplementedError

    def bounds(self, attempt: int) -> tuple[int, int]:
        """Return the shortest and the longest wait at this attempt, in milliseconds."""
        raise NotImplementedError

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


class _Growing(DeclaredWait):
    """A wait that grows with the attempt, up to ``maximum`` before jitter."""

    maximum: int
    jitter: float
    random: Random | None

    def base(self, attempt: int) -> float:
        raise NotImplementedError

    def bounds(self, attempt: int) -> tuple[int, int]:
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


class _Constant(DeclaredWait):
    declared_as = "constant"

    ms: int

    def bounds(self, attempt: int) -> tuple[int, int]:
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
        factor=checked_number(where, "factor", factor, 1),
        jitter=checked_share(where, jitter),
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
        power=checked_number(where, "power", power, 0),
        scale=checked_wait(where, "scale", scale),
        offset=checked_wait(where, "offset", offset),
        maximum=checked_wait(where, "maximum", maximum),
        jitter=checked_share(where, jitter),
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
    return constant_of("constant()", "ms", ms)


def constant_of(where: str, option: str, ms: Any) -> _Constant:
    """Return the constant wait of an option."""
    return _Constant(ms=checked_wait(where, option, ms))


def checked_number(where: str, name: str, value: object, least: float) -> float:
    # An int can be finite and beyond what a float holds.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= sys.float_info.max:
        raise ConfigurationError.of_option(where, name, f"a number of at least {least}", value)
    return value


def checked_share(where: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigurationError.of_option(where, "jitter", "a share from 0 to 1", value)
    return value
