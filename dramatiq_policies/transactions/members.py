"""The messages of a row: the message itself, or the callbacks of a group after the last member is counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_OID, uuid5

from dramatiq import Message
from dramatiq.middleware import GroupCallbacks as StockGroupCallbacks
from dramatiq.rate_limits import Barrier

from ..brokers.batch import Batch, Encoded
from ..delivery.validation import check_shape
from ..middleware.composition import GroupCallbacks
from .outbox_table import MEMBER, MESSAGE, Row

if TYPE_CHECKING:
    from dramatiq.broker import Broker

__all__ = ["messages_of", "without"]

_CALLBACKS = "group_completion_callbacks"


def messages_of(row: Row, batch: Batch) -> list[Encoded]:
    """Return the messages to publish for a row; none for a member of an incomplete group.

    Raises:
      Exception: The row can't be read, or the member can't be counted at present.
    """
    message = Message.decode(row.body)
    check_shape(message)
    if row.kind == MESSAGE:
        if batch.id_option is None or type(message.options.get(batch.id_option)) is str:
            return [Encoded(message, row.body)]
        # The application had another broker when it sent the message.
        return [_with_id(batch, f"{row.message_id} {row.id}", message)]
    if row.kind != MEMBER:
        raise ValueError(f"unknown kind of row: {row.kind!r}")
    if not _completes_group(batch.broker, message):
        return []
    callbacks = message.options[_CALLBACKS]
    return [_prepared(batch, row, number, Message(**callbacks[number])) for number in _waiting(callbacks)]


def without(row: Row, accepted: Sequence[int]) -> bytes:
    """Return the body of a member row without the accepted ones of its `messages_of`: only the rest is published again."""
    message = Message.decode(row.body)
    callbacks = list(message.options[_CALLBACKS])
    waiting = _waiting(callbacks)
    for position in accepted:
        # The others keep their numbers, and with them their ids.
        callbacks[waiting[position]] = None
    return message.copy(options={_CALLBACKS: callbacks}).encode()


def _waiting(callbacks: Sequence[Any]) -> list[int]:
    """Return the numbers of the callbacks that the broker has not accepted."""
    return [number for number, callback in enumerate(callbacks) if callback is not None]


def _completes_group(broker: Broker, message: Message[Any]) -> bool:
    for middleware in broker.middleware:
        if isinstance(middleware, StockGroupCallbacks):
            uuid = message.options["group_completion_uuid"]
            count = middleware.counter() if isinstance(middleware, GroupCallbacks) else None
            if count is not None:
                return count(uuid, message.message_id)
            return bool(Barrier(middleware.rate_limiter_backend, uuid, ttl=middleware.barrier_ttl).wait(block=False))
    raise RuntimeError(
        "The broker has no GroupCallbacks middleware, so the group can't be counted. Add dramatiq.middleware.GroupCallbacks to the broker."
    )


def _prepared(batch: Batch, row: Row, number: int, callback: Message[Any]) -> Encoded:
    prepared = batch.prepare(callback, None)
    return _with_id(batch, f"{row.message_id} {number} {callback.message_id}", prepared)


def _with_id(batch: Batch, seed: str, message: Message[Any]) -> Encoded:
    """Give a message the same id of the broker at each try: a repeated publication leaves one body."""
    if batch.id_option is not None:
        message = message.copy(options={batch.id_option: str(uuid5(NAMESPACE_OID, seed))})
    return Encoded(message, message.encode())
