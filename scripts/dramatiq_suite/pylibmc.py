"""The part of pylibmc used by Dramatiq, on a dict: the suite requires memcached for tests of other things."""

from __future__ import annotations

import itertools
import threading
import time as clock
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

lock = threading.RLock()
items: dict[str, tuple[Any, int, float]] = {}  # value, cas id, expires at
ids = itertools.count(1)


class SomeErrors(Exception):
    pass


class NotFound(SomeErrors):
    pass


class Client:
    def __init__(self, **_parameters: Any) -> None:
        pass

    def get_stats(self) -> list[Any]:
        return []

    def flush_all(self) -> None:
        items.clear()

    def gets(self, key: str) -> tuple[Any, int | None]:
        with lock:
            value, cas_id, expires_at = items.get(key, (None, None, 0.0))
            if expires_at <= clock.monotonic():
                items.pop(key, None)
                return None, None
            return value, cas_id

    def get(self, key: str) -> Any:
        return self.gets(key)[0]

    def get_multi(self, keys: list[str]) -> dict[str, Any]:
        found = {key: self.gets(key) for key in keys}
        return {key: value for key, (value, cas_id) in found.items() if cas_id is not None}

    def set(self, key: str, value: Any, time: float = 0) -> bool:
        with lock:
            items[key] = (value, next(ids), clock.monotonic() + time if time else float("inf"))
        return True

    def add(self, key: str, value: Any, time: float = 0) -> bool:
        with lock:
            return self.gets(key)[1] is None and self.set(key, value, time)

    def cas(self, key: str, value: Any, cas_id: int, time: float = 0) -> bool:
        with lock:
            found = self.gets(key)[1]
            if found is None:
                raise NotFound(key)
            return found == cas_id and self.set(key, value, time)

    def incr(self, key: str, delta: int = 1) -> int:
        with lock:
            value, cas_id = self.gets(key)
            if cas_id is None:
                raise NotFound(key)
            changed = max(0, value + delta)
            items[key] = (changed, next(ids), items[key][2])
            return changed

    def decr(self, key: str, delta: int = 1) -> int:
        return self.incr(key, -delta)


class ClientPool:
    def __init__(self, client: Client, size: int) -> None:
        self.client = client

    @contextmanager
    def reserve(self, *, block: bool = False) -> Iterator[Client]:
        yield self.client
