"""Publish many messages on RabbitMQ: mandatory, with pipelined confirms, over this thread's connection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import pika.exceptions
from dramatiq import Message
from dramatiq.common import q_name
from dramatiq.errors import ConnectionClosed

from ... import _dramatiq
from ...common.connections import discard
from ..batch import Encoded, KnownBatch
from .confirms import PipelinedConfirms
from .publisher import LOST

__all__ = ["RabbitmqBatch"]

#: Seconds to wait for confirms.
_CONFIRM_WITHIN = 10.0
#: Reply codes of a closed channel that blame a message or a queue: too large, no rights, other arguments.
_BLAME = frozenset({311, 403, 404, 405, 406})
_ATTRIBUTE = "dramatiq_policies_confirms"


class RabbitmqBatch(KnownBatch):
    """Publishes over a separate channel. If a message closes the channel, the rest is published one by one to find the message."""

    overlaps = True

    def publish(
        self, messages: Sequence[Encoded], meanwhile: Callable[[], object] | None = None
    ) -> list[Exception | None]:
        results = self._try(messages, meanwhile)
        if any(isinstance(result, ConnectionClosed) for result in results):
            return results
        for number, result in enumerate(results):
            if result is not None:
                # One by one, with a new declaration and a new channel: an error concerns this message only.
                (results[number],) = self._try([messages[number]])
        return results

    def _try(
        self, messages: Sequence[Encoded], meanwhile: Callable[[], object] | None = None
    ) -> list[Exception | None]:
        results = self._refused_queues(messages)
        todo = [number for number in range(len(messages)) if number not in results]
        results.update(self._publish_once(messages, todo, meanwhile))
        again = [number for number in todo if isinstance(results[number], _Closed)]
        # An idle connection is often closed by the server.
        results.update(self._publish_once(messages, again))
        return [results[number] for number in range(len(messages))]

    def _refused_queues(self, messages: Sequence[Encoded]) -> dict[int, Exception | None]:
        """Declare the queues. Returns the messages with refused queues."""
        refused: dict[int, Exception | None] = {}
        errors: dict[str, Exception | None] = {}
        for number, (message, _) in enumerate(messages):
            queue = q_name(message.queue_name)
            if queue not in errors:
                errors[queue] = self._declared(queue)
            if errors[queue] is not None:
                refused[number] = errors[queue]
        return refused

    def _declared(self, queue: str) -> Exception | None:
        try:
            self.broker.declare_queue(queue, ensure=True)
        except ConnectionClosed as error:
            cause: Any = error.message
            return cause if _is_blame(cause) else error
        except Exception as error:
            self._drop_connection()
            return ConnectionClosed(error) if isinstance(error, (*LOST, OSError)) else error
        return None

    def _publish_once(
        self, messages: Sequence[Encoded], todo: list[int], meanwhile: Callable[[], object] | None = None
    ) -> dict[int, Exception | None]:
        if not todo:
            return {}
        is_new = getattr(self.broker.state, "connection", None) is None
        try:
            confirms = self._confirms()
        except (*LOST, OSError) as error:
            self._drop_connection()
            return dict.fromkeys(todo, _lost(error, again=not is_new))
        lost: Exception | None = None
        try:
            # Detects a connection closed by the server.
            confirms.connection.process_data_events(0)
            confirms.write(
                (message.queue_name, body, _priority(message)) for message, body in (messages[n] for n in todo)
            )
            if meanwhile is not None:
                # The server works on the messages.
                confirms.connection.process_data_events(0)
                meanwhile()
            self._wait(confirms)
        except (*LOST, OSError) as error:
            lost = error
        if not confirms.channel.is_open:
            # A later call only says that the channel is closed, and not why.
            lost = confirms.closed_by or lost or pika.exceptions.ChannelWrongStateError("the channel is closed")
        return {number: self._result(confirms, index, lost, messages[number]) for index, number in enumerate(todo)}

    def _result(
        self, confirms: PipelinedConfirms, index: int, lost: Exception | None, one: Encoded
    ) -> Exception | None:
        if index in confirms.accepted:
            return None
        if index in confirms.refused:
            # If the queue has disappeared, the next try declares it.
            self.broker.queues_pending.add(q_name(one.message.queue_name))
            return RuntimeError(confirms.refused[index])
        if lost is None:
            self._drop_connection()
            return ConnectionClosed(f"RabbitMQ did not confirm within {_CONFIRM_WITHIN:g} s")
        if _is_blame(lost):
            return lost
        self._drop_connection()
        return _lost(lost, again=True)

    def _wait(self, confirms: PipelinedConfirms) -> None:
        until = monotonic() + _CONFIRM_WITHIN
        while confirms.waiting and confirms.channel.is_open and (left := until - monotonic()) > 0:
            confirms.connection.process_data_events(min(left, 0.5))

    def _confirms(self) -> PipelinedConfirms:
        state, connection = self.broker.state, self.broker.connection
        confirms: PipelinedConfirms | None = getattr(state, _ATTRIBUTE, None)
        if confirms is None or confirms.connection is not connection or not confirms.channel.is_open:
            confirms = PipelinedConfirms(connection)
            setattr(state, _ATTRIBUTE, confirms)
        confirms.forget()
        return confirms

    def _drop_connection(self) -> None:
        """Close this thread's connection abruptly: unconfirmed messages must not be sent any more."""
        discard(_dramatiq.take_rabbitmq_connection(self.broker))

    def serve(self) -> None:
        connection = getattr(self.broker.state, "connection", None)
        try:
            if connection is not None:
                connection.process_data_events(0)
        except (*LOST, OSError):
            self._drop_connection()

    def close(self) -> None:
        del self.broker.connection


class _Closed(ConnectionClosed):
    """The connection was lost, perhaps long ago: try once more on a new connection."""


def _lost(error: Exception, *, again: bool) -> ConnectionClosed:
    return (_Closed if again else ConnectionClosed)(error)  # type: ignore[no-untyped-call]


def _is_blame(error: object) -> bool:
    return isinstance(error, pika.exceptions.ChannelClosedByBroker) and error.reply_code in _BLAME


def _priority(message: Message[Any]) -> int | None:
    priority: int | None = message.options.get("broker_priority")
    return priority
