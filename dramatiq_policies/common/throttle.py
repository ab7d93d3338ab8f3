"""Do something once per interval and key."""

from __future__ import annotations

from collections.abc import Hashable

from . import clock

__all__ = ["Throttle"]

#: How many keys are remembered. Exception classes may be created dynamically, so keys must not pile up.
_REMEMBERED = 1_000


class Throttle:
    """Remembers when each key was last let through."""

    def __init__(self) -> None:
        self._last: dict[Hashable, float] = {}

    def admits(self, key: Hashable, interval_ms: float) -> bool:
        """Return True for the first call with this key, and again once ``interval_ms`` have passed."""
        now = clock.monotonic()
        last = self._last.get(key)
        if last is not None and (now - last) * 1_000 < interval_ms:
            return False
        if len(self._last) >= _REMEMBERED:
            self._last.clear()
        self._last[key] = now
        return True
