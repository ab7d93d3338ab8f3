"""An idempotency store in memory, for tests and for a single worker process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock

from ..common import clock as clocks
from ..common.forks import after_fork
from . import Entry, Renewal

__all__ = ["MemoryStore"]


def _now() -> float:
    # Looked up at each call, because the test kit replaces the clock.
    return clocks.monotonic()


class MemoryStore:
    """Keeps keys in the memory of this process. Other processes see none of the keys, and a restart forgets all keys.

    Example::

        install(broker, idempotency=Idempotency(MemoryStore()))

    Parameters:
      clock: A callable that returns the time in seconds. Default (None): the monotonic clock.
    """

    #: No worker of another version reads this memory.
    may_hold_earlier_records = False

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.clock: Callable[[], float] = _now if clock is None else clock
        self._entries: dict[str, tuple[bytes, float]] = {}
        self._sweep_at = 1_024
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        """Replace the lock. The child keeps a copy of the keys."""
        self._lock = Lock()

    def swap(self, key: str, expected: bytes | None, value: bytes | None, ttl: int) -> Entry | None:
        with self._lock:
            found = self._find(key)
            if found.value != expected:
                return found
            if value is None:
                self._entries.pop(key, None)
            else:
                self._write(key, value, ttl)
            return None

    def put(self, key: str, value: bytes, ttl: int) -> None:
        with self._lock:
            self._write(key, value, ttl)

    def get(self, key: str) -> Entry:
        with self._lock:
            return self._find(key)

    def delete(self, key: str) -> bool:
        with self._lock:
            found = self._find(key).value is not None
            self._entries.pop(key, None)
            return found

    def renew(self, renewals: Sequence[Renewal]) -> list[bool]:
        with self._lock:
            return [self._renew(renewal) for renewal in renewals]

    def _renew(self, renewal: Renewal) -> bool:
        if self._find(renewal.key).value != renewal.value:
            return False
        self._write(*renewal)
        return True

    def _find(self, key: str) -> Entry:
        value, until = self._entries.get(key, (None, 0.0))
        left = round((until - self.clock()) * 1_000)
        return Entry(None, 0) if value is None or left <= 0 else Entry(value, left)

    def _write(self, key: str, value: bytes, ttl: int) -> None:
        self._entries[key] = (value, self.clock() + ttl / 1_000)
        if len(self._entries) >= self._sweep_at:
            now = self.clock()
            self._entries = {key: entry for key, entry in self._entries.items() if entry[1] > now}
            self._sweep_at = max(1_024, 2 * len(self._entries))
