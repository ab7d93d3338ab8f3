"""A virtual clock for dramatiq_policies and Dramatiq's StubBroker during a drain.

Only the draining thread, and tasks of its event loop, see the virtual clock. Other threads, and code that calls the `time`
module directly, see the real time.
"""

from __future__ import annotations

import threading
import time as real
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from .. import _dramatiq
from ..common import clock

__all__ = ["VirtualClock", "VirtualStop", "clock_in_force"]

#: The virtual time in milliseconds after which a drain no longer retries an unreachable broker.
_STOPS_AFTER = 600_000

_in_force: ContextVar[VirtualClock | None] = ContextVar("dramatiq_policies_virtual_clock", default=None)


class VirtualClock:
    """The virtual time of one broker.

    Parameters:
      passed: Called after each advance of the clock.

    Attributes:
      now: Milliseconds since the epoch. Starts at the real time and changes only by `advance`, so that tests can compute
        exact times.
      skipped: Sum of all advances, in milliseconds. `monotonic` returns the real monotonic clock plus this sum, so that real
        delays still count.
    """

    def __init__(self, passed: Callable[[], object]) -> None:
        self.now = int(real.time() * 1_000)
        self.skipped = 0
        self._passed = passed

    def advance(self, ms: int) -> None:
        """Advance the clock."""
        self.now += ms
        self.skipped += ms
        if ms:
            self._passed()

    def time(self) -> float:
        # The tenth of a millisecond protects callers that multiply by 1,000 and round down.
        return (self.now + 0.1) / 1_000

    def monotonic(self) -> float:
        return real.monotonic() + self.skipped / 1_000

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Show the virtual clock to this thread."""
        token = _in_force.set(self)
        _replace_clocks()
        try:
            yield
        finally:
            _restore_clocks()
            _in_force.reset(token)


def clock_in_force() -> VirtualClock | None:
    """Return the virtual clock of this thread or task, or None."""
    return _in_force.get()


class VirtualStop(threading.Event):
    """The stop event of a drain: a wait takes virtual time, and after some minutes the event is set."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self.clock = clock
        self.waited = 0

    def wait(self, timeout: float | None = None) -> bool:
        if timeout is None or clock_in_force() is not self.clock:
            return super().wait(timeout)
        ms = round(timeout * 1_000)
        self.clock.advance(ms)
        self.waited += ms
        if self.waited > _STOPS_AFTER:
            self.set()
        return self.is_set()


def _time() -> float:
    virtual = _in_force.get()
    return real.time() if virtual is None else virtual.time()


def _monotonic() -> float:
    virtual = _in_force.get()
    return real.monotonic() if virtual is None else virtual.monotonic()


def _sleep(seconds: float) -> None:
    virtual = _in_force.get()
    if virtual is None:
        real.sleep(seconds)
    else:
        virtual.advance(round(seconds * 1_000))


class _TimeModule:
    """Replaces the `time` module in Dramatiq's modules."""

    time = staticmethod(_time)
    monotonic = staticmethod(_monotonic)

    def __getattr__(self, name: str) -> Any:
        return getattr(real, name)


_lock = threading.Lock()
_users = 0
_saved: list[tuple[Any, str, Any]] = []
_time_module = _TimeModule()
_FUNCTIONS: dict[str, Callable[..., Any]] = {"time": _time, "monotonic": _monotonic, "sleep": _sleep}


def _replace_clocks() -> None:
    global _users  # noqa: PLW0603 - how many drain now
    with _lock:
        _users += 1
        if _users > 1:
            return
        ours: list[tuple[Any, str]] = [(clock, name) for name in _FUNCTIONS]
        for module, name in [*ours, *_dramatiq.clock_places()]:
            original = getattr(module, name)
            _saved.append((module, name, original))
            setattr(module, name, _time_module if original is real else _FUNCTIONS[name])


def _restore_clocks() -> None:
    global _users  # noqa: PLW0603
    with _lock:
        _users -= 1
        if _users == 0:
            while _saved:
                setattr(*_saved.pop())
