"""Publish many messages on Redis, in one script a megabyte."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from typing import Any
from uuid import uuid4

import redis
from dramatiq import Message
from dramatiq.errors import ConnectionClosed

from ..._redis import Script
from ..batch import Encoded, KnownBatch

__all__ = ["RedisBatch"]

_PUBLISH = Script(resources.files(__package__).joinpath("publish.lua").read_text())
#: The size of one call, in bytes. A larger message goes alone.
_MOST_BYTES = 1_000_000
#: The first words of errors of a server that takes nothing for now.
_NOT_NOW = (
    "OOM",
    "MISCONF",
    "NOREPLICAS",
    "READONLY",
    "LOADING",
    "MASTERDOWN",
    "CLUSTERDOWN",
    "TRYAGAIN",
    "BUSY",
    "UNBLOCKED",
)


class RedisBatch(KnownBatch):
    """Publishes without a doubled message after a lost reply, as long as no worker has finished the message."""

    id_option = "redis_message_id"

    def options_of(self, message: Message[Any]) -> dict[str, Any]:
        return {self.id_option: str(uuid4())}

    def publish(
        self, messages: Sequence[Encoded], meanwhile: Callable[[], object] | None = None
    ) -> list[Exception | None]:
        results: list[Exception | None] = []
        for chunk in _chunks(messages):
            lost = results[-1] if results and isinstance(results[-1], ConnectionClosed) else None
            results += self._publish_chunk(chunk) if lost is None else [lost] * len(chunk)
        return results

    def _publish_chunk(self, messages: Sequence[Encoded]) -> list[Exception | None]:
        args = [
            part for message, body in messages for part in (message.queue_name, message.options[self.id_option], body)
        ]
        try:
            answers = self._call(args)
        except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
            return [ConnectionClosed(error)] * len(messages)
        # A ValueError: a text that can't be encoded.
        except (redis.RedisError, ValueError) as error:
            if _is_for_now(str(error)):
                return [ConnectionClosed(error)] * len(messages)
            if len(messages) == 1:
                return [error]
            return [result for one in messages for result in self._publish_chunk([one])]
        return [_error_of(answer.decode(errors="replace")) for answer in answers]

    def _call(self, args: list[Any]) -> list[bytes]:
        keys = [self.broker.namespace]
        try:
            return list(_PUBLISH.call(self.broker.client, keys, args))
        except (redis.ConnectionError, redis.TimeoutError, OSError):
            # An idle connection is often closed by the server.
            return list(_PUBLISH.call(self.broker.client, keys, args))


def _chunks(messages: Sequence[Encoded]) -> Iterator[Sequence[Encoded]]:
    start, size = 0, 0
    for number, (_, body) in enumerate(messages):
        if number > start and size + len(body) > _MOST_BYTES:
            yield messages[start:number]
            start, size = number, 0
        size += len(body)
    if messages:
        yield messages[start:]


def _is_for_now(text: str) -> bool:
    return text.removeprefix("-").startswith(_NOT_NOW) or "-OOM " in text or "READONLY You can't write" in text


def _error_of(text: str) -> Exception | None:
    if not text:
        return None
    return ConnectionClosed(text) if _is_for_now(text) else redis.ResponseError(text.removeprefix("-"))
