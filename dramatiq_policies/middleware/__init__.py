"""The middleware of dramatiq_policies, one per module; `ordering` puts them in order on a broker."""

from __future__ import annotations

__all__ = [
    "background_thread",
    "base",
    "composition",
    "discard_logger",
    "error_classifier",
    "heartbeat",
    "idempotency",
    "metrics",
    "ordering",
    "queue_monitor",
    "sentry",
    "shutdown",
    "timeout",
]
