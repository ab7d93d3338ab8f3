"""Publish many messages on a StubBroker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dramatiq import Message
from dramatiq.errors import QueueNotFound

from ..batch import Encoded, KnownBatch

__all__ = ["StubBatch"]


class StubBatch(KnownBatch):
    """Puts messages on the queues in memory."""

    def options_of(self, message: Message[Any]) -> dict[str, Any]:
        if message.queue_name not in self.broker.queues:
            raise QueueNotFound(message.queue_name)
        return {}

    def publish(
        self, messages: Sequence[Encoded], meanwhile: Callable[[], object] | None = None
    ) -> list[Exception | None]:
        return [self._publish_one(*one) for one in messages]

    def _publish_one(self, message: Message[Any], body: bytes) -> Exception | None:
        queue = self.broker.queues.get(message.queue_name)
        if queue is None:
            return QueueNotFound(message.queue_name)
        queue.put(body)
        return None
