"""Clients of the scenario's servers, from the URLs that its workers are given, too."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import redis
from redis.sentinel import Sentinel

#: Seconds.
SOCKET_TIMEOUT = 2.0


def redis_client(url: str, **arguments: Any) -> redis.Redis:
    """A client of ``redis://host:port/0``, or of the master behind ``sentinel://host:port/name``."""
    parts = urlsplit(url)
    if parts.scheme != "sentinel":
        return redis.Redis.from_url(url, **arguments)
    sentinel = Sentinel([(str(parts.hostname), int(parts.port or 0))], socket_timeout=SOCKET_TIMEOUT)
    return sentinel.master_for(parts.path.strip("/"), **{"socket_timeout": SOCKET_TIMEOUT, **arguments})
