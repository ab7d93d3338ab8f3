"""RabbitMQ: consume, confirm, count and browse."""

from __future__ import annotations

__all__ = ["batch", "browser", "delayed", "queue_reader", "transport"]
