"""Find a middleware on a broker."""

from __future__ import annotations

from typing import TypeVar

from dramatiq.broker import Broker
from dramatiq.middleware import Middleware

__all__ = ["find_middleware"]

M = TypeVar("M", bound=Middleware)


def find_middleware(broker: Broker, kind: type[M]) -> M | None:
    """Return the first middleware of a class on a broker; None without one."""
    return next((middleware for middleware in broker.middleware if isinstance(middleware, kind)), None)
