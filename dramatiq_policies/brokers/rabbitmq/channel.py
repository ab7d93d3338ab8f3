"""The channel of one consumer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from dramatiq.errors import ConnectionClosed

from ... import _dramatiq
from .publisher import LOST

__all__ = ["ConsumerChannel"]

T = TypeVar("T")


class ConsumerChannel:
    """The channel and the connection of Dramatiq's consumer. Only the consumer's thread may use them.

    Attributes:
      deliveries: Yields (method, properties, body); the body is None if no message arrived for a while.
      closed: Whether the channel is known to be lost. The server redelivers its messages.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.deliveries: Iterator[tuple[Any, Any, bytes | None]] = _dramatiq.rabbitmq_deliveries(inner)
        self.closed = False

    @property
    def is_lost(self) -> bool:
        """Whether the server takes back the messages of this channel."""
        inner = self._inner
        return self.closed or not inner.channel.is_open or not inner.connection.is_open

    def call(self, call: Callable[..., T], *args: Any) -> T:
        """Use the connection.

        Raises:
          ConnectionClosed: The connection is lost.
        """
        try:
            return call(*args)
        except (*LOST, OSError) as error:
            self.closed = True
            raise ConnectionClosed(error) from None

    def ack(self, tag: int) -> None:
        """Acknowledge a message."""
        self.call(self._inner.channel.basic_ack, tag)

    def nack(self, tag: int) -> None:
        """Return a message to its queue."""
        if not self.is_lost:
            self.call(partial(self._inner.channel.basic_nack, requeue=True), tag)

    def serve(self, seconds: float) -> None:
        """Exchange heartbeats and events with the server, for a while."""
        self.call(self._inner.connection.process_data_events, seconds)

    def get(self, queue: str) -> tuple[Any, Any, Any]:
        """Ask for one message. Returns (method, properties, body); the method is None if the queue is empty."""
        got: tuple[Any, Any, Any] = self.call(self._inner.channel.basic_get, queue)
        return got

    def cancel(self) -> None:
        """Consume no further: the server delivers prefetched messages to other workers."""
        self.call(self._inner.channel.cancel)

    def consume(self, queue: str, wait: float) -> None:
        """Consume again after `cancel`."""
        self.deliveries = self._inner.iterator = self._inner.channel.consume(queue, inactivity_timeout=wait)
