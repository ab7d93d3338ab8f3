"""Piles on Redis: each step is one script, and keys are read without Dramatiq's commands, which leave heartbeats."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any
from uuid import uuid4

import redis
from dramatiq import Message

from ...common.credentials import redact
from ...errors import OperationError
from ..browser import Item

__all__ = ["open_browser"]

_MOVE = resources.files(__package__).joinpath("move.lua").read_text()
_PAGE = 500


@contextmanager
def open_browser(broker: Any, queue: str, *, dead: bool) -> Iterator[RedisPile]:
    """See the package's."""
    try:
        yield RedisPile(broker, queue, dead=dead)
    except redis.RedisError as error:
        raise OperationError(f"Redis does not answer as it should: {redact(str(error))}") from None


class RedisPile:
    """The dead letters, or the ready messages, of one queue."""

    def __init__(self, broker: Any, queue: str, *, dead: bool) -> None:
        self.broker = broker
        self.queue = queue
        self.dead = dead
        self.client = broker.client
        self.script = self.client.register_script(_MOVE)
        self.key = f"{broker.namespace}:{queue}" + (".XQ" if dead else "")
        self.size: int = self.client.zcard(self.key) if dead else self.client.llen(self.key)
        newest = self.client.zrange(self.key, -1, -1, withscores=True) if dead else []
        #: What is dead-lettered later is not of this pile.
        self.last = newest[0][1] if newest else 0.0
        self.taken = False

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Item]:
        seen = 0
        kept: Any = None
        while seen < self.size:
            page = self._page(kept)
            if not page:
                return
            bodies = self.client.hmget(f"{self.key}.msgs", [place for place, _ in page])
            for (place, score), body in zip(page, bodies, strict=True):
                if score is not None and score > self.last:
                    return
                seen += 1
                self.taken = False
                if body is not None:
                    at_ms = None if score is None else int(score)
                    yield Item(body if isinstance(body, bytes) else body.encode(), at_ms, place)
                if not self.taken:
                    kept = (place, score)
                if seen >= self.size:
                    return

    def _page(self, kept: Any) -> list[tuple[Any, float | None]]:
        """The next ones behind the last that was left where it was."""
        if self.dead:
            start = 0
            if kept is not None:
                rank = self.client.zrank(self.key, kept[0])
                # It has expired, or somebody else took it: go on at its time.
                start = self.client.zcount(self.key, "-inf", f"({kept[1]}") if rank is None else rank + 1
            return list(self.client.zrange(self.key, start, start + _PAGE - 1, withscores=True))
        place = None if kept is None else self.client.lpos(self.key, kept[0])
        # Workers take from the front: if it is gone, so is all before it.
        start = 0 if place is None else place + 1
        return [(found, None) for found in self.client.lrange(self.key, start, start + _PAGE - 1)]

    def read_all(self) -> Iterator[Item]:
        return iter(self)

    def send(self, item: Item, message: Message[Any]) -> bool:
        redis_id = str(uuid4())
        message = message.copy(options={"redis_message_id": redis_id})
        self.broker.declare_queue(message.queue_name)
        self.broker.emit_before("enqueue", message, None)
        sent = self._move(item, message.queue_name, redis_id, message.encode())
        if sent:
            self.broker.emit_after("enqueue", message, None)
        return sent

    def drop(self, item: Item) -> bool:
        return self._move(item)

    def _move(self, item: Item, *successor: str | bytes) -> bool:
        self.taken = True
        kind = "dead" if self.dead else "ready"
        moved = self.script(keys=[self.broker.namespace], args=[kind, self.queue, item.place, *successor])
        return bool(moved)

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)
