"""RabbitMQ: consume, confirm, count and browse."""

from __future__ import annotations
