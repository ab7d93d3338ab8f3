"""An index of delayed messages on Redis, by due time.

A worker holds the nearest messages of a delay queue and leaves the others to the index. When a message is due, any worker of the
queue takes the message. `delay_index.lua` describes the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import resources
from typing import Any

from ..._redis import Script
from ...delivery.history import now_ms

__all__ = ["DelayIndex"]

_SCRIPT = Script(resources.files(__package__).joinpath("delay_index.lua").read_text())
#: The limit of messages for one call.
BATCH = 500
#: After how many ms to ask again, because another worker may have added a nearer message.
_LOOK_EVERY = 1_000
#: The largest time that Redis compares exactly.
_NEVER = 2**53


class DelayIndex:
    """The index of one delay queue.

    Parameters:
      broker: The RedisBroker.
      queue: The delay queue's name.
      call: Sends one command to Redis and returns the answer.
    """

    def __init__(self, broker: Any, queue: str, call: Callable[..., Any]) -> None:
        self.broker = broker
        self.queue = queue
        self._call = call
        #: When to ask for due messages next, in milliseconds since the epoch.
        self.next_look: float = 0

    def keep(self, messages: Iterable[tuple[str, float]]) -> None:
        """Move messages (redis id, due time) of this process to the index."""
        pairs = [(redis_id, min(eta, _NEVER)) for redis_id, eta in messages]
        for start in range(0, len(pairs), BATCH):
            some = pairs[start : start + BATCH]
            self._run("keep", *[part for pair in some for part in pair])
            self.next_look = min(self.next_look, *[eta for _, eta in some])

    def take(self, limit: int) -> list[tuple[bytes, bytes]]:
        """Take at most ``limit`` due messages, as (redis id, body). This process then holds the messages until the ack."""
        now = now_ms()
        if limit <= 0 or now < self.next_look:
            return []
        following: bytes | None
        following, *taken = self._run("take", now, min(limit, BATCH))
        self.next_look = now + _LOOK_EVERY
        if following is not None:
            self.next_look = min(self.next_look, float(following))
        return list(zip(taken[::2], taken[1::2], strict=True))

    def release(self) -> None:
        """Requeue all messages of the index, unless another worker uses the index."""
        while self._run("release", self.broker.heartbeat_timeout, BATCH):
            pass

    def _run(self, command: str, *args: Any) -> Any:
        broker = self.broker
        return self._call(*_SCRIPT.command([broker.namespace], [command, broker.broker_id, self.queue, *args]))
