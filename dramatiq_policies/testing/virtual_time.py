"""A clock that goes forward when somebody says so: what the bundle and Dramatiq's StubBroker see while a broker is drained.

It is seen from the thread (and the event loop's tasks) that drains, and by nobody else: other threads, and whoever calls
the `time` module, see the real one.
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

#: The virtual time, in ms, after which a drain stops to retry an unreachable broker.
_PATIENCE = 600_000

_in_force: ContextVar[VirtualClock | None] = ContextVar("dramatiq_policies_virtual_clock", default=None)


class VirtualClock:
    """The time on one broker.

    Parameters:
      passed: Called whenever time has gone by.

    Attributes:
      now: Milliseconds since the epoch. It begins at the real time, and stands still but for `advance`, so that what is
        computed from it is exact.
      skipped: How many milliseconds it was advanced in all. Its monotonic clock is the real one plus these, so that
        what really takes time is seen to.
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
        _put_in_place()
        try:
            yield
        finally:
            _put_back()
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
        if self.waited > _PATIENCE:
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
_stand_in = _TimeModule()
_FUNCTIONS: dict[str, Callable[..., Any]] = {"time": _time, "monotonic": _monotonic, "sleep": _sleep}


def _put_in_place() -> None:
    global _users  # noqa: PLW0603 - how many drain now
    with _lock:
        _users += 1
        if _users > 1:
            return
        ours: list[tuple[Any, str]] = [(clock, name) for name in _FUNCTIONS]
        for module, name in [*ours, *_dramatiq.clock_places()]:
            original = getattr(module, name)
            _saved.append((module, name, original))
            setattr(module, name, _stand_in if original is real else _FUNCTIONS[name])


def _put_back() -> None:
    global _users  # noqa: PLW0603
    with _lock:
        _users -= 1
        if _users == 0:
            while _saved:
                setattr(*_saved.pop())
