"""Enqueue on behalf of the library itself: retries and due messages never wait for a transaction of the application."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dramatiq import Message
    from dramatiq.broker import Broker

__all__ = ["enqueue_directly", "is_direct"]

_here = threading.local()


def enqueue_directly(broker: Broker, message: Message[Any], delay: int | None = None) -> Message[Any]:
    """Call ``broker.enqueue`` past an outbox on the broker."""
    before = is_direct()
    _here.direct = True
    try:
        return broker.enqueue(message, delay=delay)
    finally:
        _here.direct = before


def is_direct() -> bool:
    """Return whether this thread is inside `enqueue_directly`."""
    return getattr(_here, "direct", False)
