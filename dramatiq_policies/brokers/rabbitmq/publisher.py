"""Publish single messages on RabbitMQ, mandatory and confirmed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pika
import pika.exceptions
from dramatiq import Message
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.common import q_name
from pika.adapters.utils.connection_workflow import AMQPConnectorException

from ... import _dramatiq
from ...common.connections import discard
from ...delivery.outgoing import OutgoingMessage
from ..batch import prepared

__all__ = ["LOST", "REFUSED", "ConfirmedPublisher"]

#: The connection or the channel is lost.
LOST = (
    pika.exceptions.AMQPConnectionError,
    pika.exceptions.AMQPChannelError,
    # A server that is frozen takes connections and says nothing.
    AMQPConnectorException,
    AssertionError,
)
#: The server refused one message.
REFUSED = (pika.exceptions.UnroutableError, pika.exceptions.NackError)


class ConfirmedPublisher:
    """Publishes over a channel of ours, on the broker's own connection for the calling thread.

    Parameters:
      broker: The broker.
      encode: Encodes a message, or raises `Unsendable`.
    """

    def __init__(self, broker: RabbitmqBroker, encode: Callable[[Message[Any]], bytes]) -> None:
        self.broker: RabbitmqBroker = broker
        self.encode = encode

    def publish(self, queue: str, body: bytes, priority: int | None) -> None:
        """Publish a body to a queue, and wait for the confirm."""
        broker = self.broker
        properties = pika.BasicProperties(delivery_mode=2, priority=priority)
        try:
            for again in (True, False):
                broker.declare_queue(q_name(queue), ensure=True)
                try:
                    self._channel().basic_publish("", queue, body, properties, mandatory=True)
                    return
                except pika.exceptions.UnroutableError:
                    # The queue has disappeared: have it declared again.
                    broker.queues_pending.add(q_name(queue))
                    if not again:
                        raise
        except REFUSED:
            raise
        except Exception:
            # The next try opens a new connection.
            del broker.connection
            raise

    def enqueue(self, outgoing: OutgoingMessage) -> None:
        """Enqueue as ``RabbitmqBroker.enqueue`` does, but mandatory and confirmed."""
        self.prepare(outgoing)
        self.publish(outgoing.message.queue_name, outgoing.encoded, outgoing.message.options.get("broker_priority"))
        self.broker.emit_after("enqueue", outgoing.message, outgoing.delay)

    def prepare(self, outgoing: OutgoingMessage) -> None:
        """Encode a message once, with the queue and the due time of its delay. Runs the before-hooks of enqueue."""
        if outgoing.encoded is None:
            message = prepared(self.broker, outgoing.message, outgoing.delay)
            outgoing.message, outgoing.encoded = message, self.encode(message)

    def drop_connection(self) -> None:
        """Drop this thread's connection: an interrupted publish may wait for a confirm for ever.

        The next publish opens another connection.
        """
        self.broker.state.dramatiq_policies_channel = None
        discard(_dramatiq.take_rabbitmq_connection(self.broker))

    def _channel(self) -> Any:
        broker = self.broker
        connection = broker.connection
        channel = getattr(broker.state, "dramatiq_policies_channel", None)
        if channel is None or channel.connection is not connection or not channel.is_open:
            channel = connection.channel()
            channel.confirm_delivery()
            broker.state.dramatiq_policies_channel = channel
        return channel
