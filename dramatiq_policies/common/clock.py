"""The clocks that the bundle looks at.

Always called as ``clock.time()``, ``clock.monotonic()`` and ``clock.sleep()``, and never imported by name: the test kit
puts its virtual clock here while it drains a broker. How long a job has run, and when it is interrupted, is measured by
the real clock.
"""

from __future__ import annotations

from time import monotonic as monotonic  # noqa: PLC0414 - re-exported
from time import sleep as sleep  # noqa: PLC0414
from time import time as time  # noqa: PLC0414

__all__ = ["monotonic", "sleep", "time"]
