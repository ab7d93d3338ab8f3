"""Pipelined confirms: publish many messages over one channel, and then wait for the server's answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pika

from ... import _dramatiq
from .publisher import LOST

__all__ = ["PipelinedConfirms"]


class PipelinedConfirms:
    """A channel with pipelined confirms; every publish is mandatory.

    Attributes:
      waiting: Unconfirmed messages: the index in the batch by the channel's delivery tag.
      accepted: The indexes of accepted messages.
      refused: The indexes of returned and refused messages, each with the reason.
      closed_by: The error with which the channel was closed; None while it is open.
    """

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.channel = connection.channel()
        self.closed_by: Exception | None = None
        self._inner = _dramatiq.rabbitmq_confirmed(self.channel, self._confirmed, self._unroutable)
        self._inner.add_on_close_callback(self._closed)
        self._published = 0
        self.forget()

    def forget(self) -> None:
        """Forget the batch before."""
        self.waiting: dict[int, int] = {}
        self.accepted: set[int] = set()
        self.refused: dict[int, str] = {}
        self._bodies: list[bytes] = []

    def write(self, messages: Iterable[tuple[str, bytes, int | None]]) -> None:
        """Publish messages: queue, body and priority of each.

        A message that AMQP can't encode (a priority of 1,000) is refused here.
        """
        self.forget()
        for number, (queue, body, priority) in enumerate(messages):
            self._bodies.append(body)
            properties = pika.BasicProperties(delivery_mode=2, priority=priority)
            try:
                self._inner.basic_publish("", queue, body, properties, mandatory=True)
            except (*LOST, OSError):
                raise
            except Exception as error:
                self.refused[number] = f"{type(error).__name__}: {error}"
                continue
            self._published += 1
            self.waiting[self._published] = number

    def _closed(self, _channel: Any, error: Exception) -> None:
        self.closed_by = error

    def _confirmed(self, frame: Any) -> None:
        method = frame.method
        last = method.delivery_tag
        for tag in [tag for tag in self.waiting if tag <= last] if method.multiple else [last]:
            number = self.waiting.pop(tag, None)
            # The server also confirms unroutable messages, after returning them.
            if number is None or number in self.refused:
                continue
            if isinstance(method, pika.spec.Basic.Ack):
                self.accepted.add(number)
            else:
                self.refused[number] = "RabbitMQ did not take the message"
        if not self.waiting:
            # A confirm alone does not end `process_data_events`.
            self.connection.add_callback_threadsafe(lambda: None)

    def _unroutable(self, _channel: Any, method: Any, _properties: Any, body: bytes) -> None:
        text = f"RabbitMQ has returned the message: {method.reply_text} ({method.routing_key})"
        self.refused.update((number, text) for number, one in enumerate(self._bodies) if one == body)
