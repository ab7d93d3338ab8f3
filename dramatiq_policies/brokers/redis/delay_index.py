"""An index of delayed messages on Redis, by due time.

A worker holds the nearest messages of a delay queue and leaves the others to the index. When a message is due, any worker of the
queue takes the message. `delay_index.lua` describes the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import resources
from typing import Any

from dramatiq.brokers.redis import RedisBroker

from ..._redis import Script
from ...common.clock import now_ms

__all__ = ["DelayIndex"]

_SCRIPT = Script(resources.files(__package__).joinpath("delay_index.lua").read_text())
#: The limit of messages for one call.
BATCH = 500
#: After how many ms to ask again, because another worker may have added a nearer message.
_CHECK_EVERY = 1_000
#: The largest time that Redis compares exactly.
_NEVER = 2**53


class DelayIndex:
    """The index of one delay queue.

    Parameters:
      broker: The RedisBroker.
      queue: The delay queue's name.
      call: Sends one command to Redis and returns the answer.
    """

    def __init__(self, broker: RedisBroker, queue: str, call: Callable[..., Any]) -> None:
        self.broker = broker
        self.queue = queue
        self._call = call
        #: When to ask for due messages next, in milliseconds since the epoch.
        self.next_check: float = 0

    def add(self, messages: Iterable[tuple[str, float]]) -> None:
        """Move messages (redis id, due time) of this process to the index."""
        pairs = [(redis_id, min(eta, _NEVER)) for redis_id, eta in messages]
        for start in range(0, len(pairs), BATCH):
            some = pairs[start : start + BATCH]
            self._run("add", *[part for pair in some for part in pair])
            self.next_check = min(self.next_check, *[eta for _, eta in some])

    def fetch(self, limit: int) -> list[tuple[bytes, bytes]]:
        """Fetch at most ``limit`` due messages, as (redis id, body). This process then holds the messages until the ack."""
        now = now_ms()
        if limit <= 0 or now < self.next_check:
            return []
        nearest: bytes | None
        nearest, *fetched = self._run("fetch", now, min(limit, BATCH))
        self.next_check = now + _CHECK_EVERY
        if nearest is not None:
            self.next_check = min(self.next_check, float(nearest))
        return list(zip(fetched[::2], fetched[1::2], strict=True))

    def release(self) -> None:
        """Requeue all messages of the index, unless another worker uses the index."""
        while self._run("release", self.broker.heartbeat_timeout, BATCH):
            pass

    def _run(self, command: str, *args: Any) -> Any:
        broker = self.broker
        return self._call(*_SCRIPT.command([broker.namespace], [command, broker.broker_id, self.queue, *args]))
