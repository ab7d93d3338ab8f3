"""Read and move the messages of a queue on Redis, one script a message.

Dramatiq's commands would write a heartbeat, so this module reads the keys directly. To remove a message from the middle of a
queue, the script writes `_HOLE` at the position: a removal would scan the list. The end of the move removes the holes.
Workers skip a hole like every id without a body.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any
from uuid import uuid4

import redis
from dramatiq import Message
from dramatiq.brokers.redis import RedisBroker

from ...common.credentials import redact
from ...errors import OperationError
from ..browser import Item

__all__ = ["browse", "unreachable"]

_MOVE = resources.files(__package__).joinpath("move.lua").read_text()
_PAGE = 500
_HOLE = b"dramatiq_policies.moved"


@contextmanager
def browse(broker: RedisBroker, queue: str, *, dead: bool) -> Iterator[DeadLetters | ReadyMessages]:
    """Open the dead letters of a queue, or its ready messages."""
    browser = (DeadLetters if dead else ReadyMessages)(broker, queue)
    try:
        browser.open()
        try:
            yield browser
        finally:
            browser.close()
    except (redis.RedisError, OSError) as error:
        raise unreachable(broker.client, error) from None


def unreachable(client: Any, error: BaseException) -> OperationError:
    """Return the error for an unreachable Redis server, or for a refused command."""
    text = f"({type(error).__name__}: {redact(' '.join(str(error).split())).rstrip('.')})."
    if not isinstance(error, (redis.ConnectionError, redis.TimeoutError, OSError)):
        return OperationError(f"Redis refuses a command {text}")
    pool = getattr(client, "connection_pool", None)
    place = getattr(pool, "connection_kwargs", {})
    at = place.get("path") or f"{place.get('host', 'localhost')}:{place.get('port', 6379)}"
    return OperationError(f"Redis can't be reached at {at} {text}")


class _RedisBrowser:
    kind: str

    def __init__(self, broker: RedisBroker, queue: str) -> None:
        self.broker = broker
        self.queue = queue
        self.client: Any = broker.client  # The annotations of redis-py allow each reply to be a coroutine.
        self.script = self.client.register_script(_MOVE)
        self.key = f"{broker.namespace}:{queue}"
        self.size = 0

    def open(self) -> None: ...

    def close(self) -> None: ...

    def __iter__(self) -> Iterator[Item]:
        raise NotImplementedError

    def __len__(self) -> int:
        return self.size

    def _bodies(self, window: list[Any]) -> list[bytes | None]:
        bodies = self.client.hmget(f"{self.key}.msgs", window)
        return [body.encode() if isinstance(body, str) else body for body in bodies]

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
        raise NotImplementedError

    def _run(self, place: Any, position: int, *successor: str | bytes) -> int:
        args = [self.kind, self.queue, place, position, _HOLE, *successor]
        return int(self.script(keys=[self.broker.namespace], args=args))

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)


class DeadLetters(_RedisBrowser):
    """The dead letters of one queue, the oldest first."""

    kind = "dead"

    def open(self) -> None:
        self.key += ".XQ"
        self.size = self.client.zcard(self.key)
        newest = self.client.zrange(self.key, -1, -1, withscores=True)
        #: Later dead letters are not read.
        self.last = newest[0][1] if newest else 0.0
        self.taken = False

    def __iter__(self) -> Iterator[Item]:
        seen = 0
        kept: Any = None
        while seen < self.size:
            page = self._page(kept)
            if not page:
                return
            for (place, score), body in zip(page, self._bodies([place for place, _ in page]), strict=True):
                if score > self.last:
                    return
                seen += 1
                self.taken = False
                if body is not None:
                    yield Item(body, int(score), place)
                if not self.taken:
                    kept = (place, score)
                if seen >= self.size:
                    return

    def _page(self, kept: Any) -> list[tuple[Any, float]]:
        """Read the next dead letters after the last kept dead letter."""
        start = 0
        if kept is not None:
            rank = self.client.zrank(self.key, kept[0])
            # None: expired, or taken by another process. Continue at its time.
            start = self.client.zcount(self.key, "-inf", f"({kept[1]}") if rank is None else rank + 1
        return list(self.client.zrange(self.key, start, start + _PAGE - 1, withscores=True))

    def _move(self, item: Item, *successor: str | bytes) -> bool:
        self.taken = True
        return self._run(item.place, 0, *successor) >= 0


class ReadyMessages(_RedisBrowser):
    """The ready messages of one queue, in order."""

    kind = "ready"

    def open(self) -> None:
        self.close()  # A killed move has left holes.
        self.size = self.client.llen(self.key)
        #: The position of the current message, unless workers have taken messages from the front since.
        self.position = 0
        self.taken = False

    def close(self) -> None:
        self.client.lrem(self.key, 0, _HOLE)

    def __iter__(self) -> Iterator[Item]:
        seen = 0
        previous: Any = None
        kept: Any = None
        while seen < self.size:
            page = self._page(previous, kept)
            if not page:
                return
            for place, body in zip(page, self._bodies(page), strict=True):
                if _bytes(place) == _HOLE:
                    self.position += 1
                    continue
                seen += 1
                self.taken = False
                if body is not None:
                    yield Item(body, None, place)
                if not self.taken:
                    self.position += 1
                    kept = place
                previous = _HOLE if self.taken else place
                if seen >= self.size:
                    return

    def _page(self, previous: object, kept: object) -> list[Any]:
        """Read the next messages. Scans the queue only if its positions have changed."""
        if self.position:
            before = self.client.lindex(self.key, self.position - 1)
            if before is None or _bytes(before) != _bytes(previous):
                found = None if kept is None else self.client.lpos(self.key, kept)
                # Workers take from the front. If the kept message is gone, all messages in front are gone too.
                self.position = 0 if found is None else found + 1
        return list(self.client.lrange(self.key, self.position, self.position + _PAGE - 1))

    def _move(self, item: Item, *successor: str | bytes) -> bool:
        self.taken = True
        following = self._run(item.place, self.position, *successor)
        self.position = max(0, following)
        return following >= 0


def _bytes(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
