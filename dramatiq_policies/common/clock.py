"""The clocks of dramatiq_policies.

Call ``clock.time()``, ``clock.monotonic()`` and ``clock.sleep()``; never import these three by name. While the test kit drains
a broker, it replaces them by a virtual clock. Run times and timeouts of jobs use the real clock.
"""

from __future__ import annotations

from time import monotonic as monotonic  # noqa: PLC0414 - re-exported
from time import sleep as sleep  # noqa: PLC0414
from time import time as time  # noqa: PLC0414

__all__ = ["monotonic", "now_ms", "sleep", "time"]


def now_ms() -> int:
    """Return the time in milliseconds since the epoch."""
    return int(time() * 1_000)
