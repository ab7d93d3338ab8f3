"""StubBroker: consume, count and browse."""

from __future__ import annotations

__all__ = ["batch", "browser", "queue_reader", "transport"]
