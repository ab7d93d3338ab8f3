"""The transport on RabbitMQ.

The follow-up messages are published mandatory and confirmed, over a channel of ours on the calling thread's own connection. A
dead letter is published to the dead-letter queue, confirmed, and then the message is acknowledged: a crash in between leaves two
copies, never none. After this consumer's channel is closed, the server redelivers its messages, so nothing is published for them.
"""

from __future__ import annotations

from typing import Any

import pika
import pika.exceptions
from dramatiq import Message
from dramatiq.broker import MessageProxy
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.common import xq_name
from dramatiq.errors import ConnectionClosed

from ... import _dramatiq
from ...common.safe_logger import SafeLogger
from ...delivery.broker_state import BrokerState
from ...delivery.consumer import REDELIVERED
from ...delivery.delivery import Delivery
from ...delivery.refusals import Fault
from ...delivery.transport import Transport
from ...outcomes import text_of
from ..ended_runs import EndedRuns
from .acks import SharedAcks, UnackedCounts
from .channel import ConsumerChannel
from .publisher import LOST, REFUSED, ConfirmedPublisher
from .redeliveries import Redeliveries
from .unreadable import UNREADABLE, UnreadableBodies

__all__ = ["RabbitmqTransport"]

logger = SafeLogger("dramatiq_policies.outcomes")

#: Reply codes of a closed channel by which the server refuses a publish or a declaration permanently.
_FOR_GOOD = frozenset({311, 403, 406})
#: Publish a message anew after this many returns, so that no delivery limit of two or more is exceeded.
_REPUBLISH_AFTER = 2


class RabbitmqTransport(Transport):
    """Consumes, acknowledges and dead-letters on RabbitMQ."""

    redelivers_on_reconnect = True
    broker: RabbitmqBroker

    def __init__(self, state: BrokerState, inner: Any, queue_name: str, prefetch: int) -> None:
        super().__init__(state, inner, queue_name, prefetch)
        self.channel = ConsumerChannel(inner)
        self.publisher = ConfirmedPublisher(self.broker, self.encoded)
        self.unreadable = UnreadableBodies(self, self.channel, self.publisher)
        #: Whether the queue was deleted, with every message due for redelivery.
        self.deleted = False
        self.acks = SharedAcks(inner.connection, *_dramatiq.rabbitmq_acks(inner))
        self.unacked_counts = state.shared(UnackedCounts).by_queue
        self.unacked_counts[queue_name] = self.unacked_count
        self.redeliveries = Redeliveries(state.shared(EndedRuns), self)

    def unacked_count(self) -> int:
        """How many messages were delivered and not yet acknowledged."""
        return 0 if self.is_revoked() else len(self.inner.known_tags)

    def take(self) -> MessageProxy | None:
        if self.breaker.is_pausing:
            return self.unreadable.poll_paused(self.received)
        if self.redeliveries.ready:
            return self.redeliveries.ready.popleft()
        try:
            method, properties, body = next(self.channel.deliveries)
        except StopIteration:
            # The server cancelled this consumer. A job that ends before the reason is known publishes its follow-up messages:
            # a duplicate is better than a loss.
            self.deleted = True
            self.channel.closed = True
            self.deleted = self._is_queue_deleted()
            raise ConnectionClosed(f"RabbitMQ no longer delivers the queue {self.source!r}") from None
        except LOST as error:
            if getattr(error, "reply_code", None) == 404:
                # The queue has disappeared: have it declared again.
                self.broker.queues_pending.add(self.queue_name)
            self._connection_lost()
            raise ConnectionClosed(error) from None
        return None if body is None else self.received(method, properties, body)

    def received(self, method: Any, properties: Any, body: bytes) -> MessageProxy | None:
        """Return the message of one delivery; None if the body can't be read, or goes back to the queue."""
        try:
            message = self.decode(body)
        except Exception as error:
            self.unreadable.settle(method.delivery_tag, properties, body, error)
            return None
        if self.breaker.count:
            self.breaker.readable()
        if UNREADABLE in message.options:
            self.unreadable.dead_letter_again(method.delivery_tag, message)
            return None
        if (
            method.redelivered
            and self._returns_of(properties) >= _REPUBLISH_AFTER
            and self.republish(method.delivery_tag, message)
        ):
            return None
        if self.state.last_received is not None and not self.is_delay_queue and not method.redelivered:
            self.state.last_received[self.queue_name] = message
        proxy = _dramatiq.rabbitmq_message(self.inner, method, message, body)
        if self.is_delay_queue or self.redeliveries.take(proxy, body, method.redelivered):
            return proxy
        return None

    def _connection_lost(self) -> None:
        self.channel.closed = True
        self.redeliveries.lost()

    @staticmethod
    def _returns_of(properties: Any) -> int:
        """How often the message was returned to a quorum queue; 0 on a classic queue, where the server does not count."""
        count: Any = (properties.headers or {}).get("x-delivery-count")
        return int(count) if isinstance(count, int) else 0  # pika returns a subclass of int.

    def republish(self, tag: int, message: Message[Any]) -> bool:
        """Publish a message anew before its delivery limit. Returns False if the server refuses.

        A quorum queue drops a message, or silently dead-letters the message, after more returns than its limit.
        """
        again = message.copy(options={REDELIVERED: True})
        try:
            self.publisher.publish(self.source, self.encoded(again), message.options.get("broker_priority"))
        except Exception as error:
            if self.fault_of(error) is Fault.LOST:
                raise ConnectionClosed(error) from None
            logger.warning(
                "Message %s of queue %r could not be published anew (%s): after further returns, the delivery limit of the "
                "queue removes the message.",
                message.message_id,
                self.source,
                text_of(error),
            )
            return False
        self.channel.ack(tag)
        return True

    def _is_queue_deleted(self) -> bool:
        """Whether the queue was deleted. If only the queue's node is down, the queue keeps its messages."""
        try:
            self.inner.channel.queue_declare(self.source, passive=True)
        except pika.exceptions.ChannelClosedByBroker as error:
            deleted = error.reply_code == 404 and "no queue" in error.reply_text
        except LOST:
            deleted = False
        else:
            deleted = True  # Another client has declared the queue again, empty.
        if deleted:
            self.broker.queues_pending.add(self.queue_name)
            logger.warning(
                "Queue %r was deleted, with the messages that waited there. Running jobs continue, and the worker declares "
                "the queue again.",
                self.source,
            )
        return deleted

    def return_to_queue(self, message: MessageProxy) -> None:
        tag = _dramatiq.take_rabbitmq_tag(self.inner, message)
        if tag is not None:
            self.channel.nack(tag)

    def publish_follow_ups(self, message: MessageProxy, delivery: Delivery, dead: Message[Any] | bytes | None) -> None:
        if self.will_redeliver() and not delivery.completes_key():
            raise ConnectionClosed("the consumer that delivered this message is closed")
        outgoing = delivery.outgoing
        while outgoing:
            self.publisher.enqueue(outgoing[0])
            outgoing.pop(0)
        if isinstance(dead, bytes):
            self.publisher.publish(xq_name(self.source), dead, None)
        elif dead is not None:
            self.publisher.publish(xq_name(self.source), self.encoded(dead), dead.options.get("broker_priority"))

    def after_interrupt(self) -> None:
        super().after_interrupt()
        self.publisher.drop_connection()

    def ack(self, message: MessageProxy) -> None:
        if self.deleted:
            return
        if self.is_revoked():
            self._not_acked(message)
            logger.warning(
                "The connection of message %s of actor %s was lost before the acknowledgement: RabbitMQ redelivers the message, "
                "and another process may run the job again.",
                message.message_id,
                message.actor_name,
            )
            return
        super().ack(message)

    def send_ack(self, message: MessageProxy) -> None:
        tag = _dramatiq.take_rabbitmq_tag(self.inner, message)
        if tag is None:
            logger.warning("Message %s is already acknowledged.", message.message_id)
            return
        delivery: Delivery | None = getattr(message, "delivery", None)
        if delivery is not None:
            self.redeliveries.acked(delivery)
        self.acks.put(tag)

    def abandon(self, message: MessageProxy) -> None:
        if self.is_revoked():
            self._not_acked(message)

    def _not_acked(self, message: MessageProxy) -> None:
        delivery: Delivery | None = getattr(message, "delivery", None)
        if delivery is not None:
            self.redeliveries.not_acked(delivery)

    def requeue(self, messages: list[MessageProxy]) -> None:
        """Note the messages. The server requeues them when the consumer closes."""
        for message in messages:
            delivery = getattr(message, "delivery", None)
            if delivery is not None:
                self.redeliveries.requeued(delivery)

    def is_revoked(self) -> bool:
        return self.channel.is_lost

    def will_redeliver(self) -> bool:
        return self.is_revoked() and not self.deleted

    def fault_of(self, error: Exception) -> Fault:
        if isinstance(error, pika.exceptions.ChannelClosedByBroker) and error.reply_code in _FOR_GOOD:
            return Fault.PERMANENT
        return super().fault_of(error)

    def lost_connection(self, error: Exception) -> bool:
        if isinstance(error, REFUSED):
            return False
        return isinstance(error, LOST) or super().lost_connection(error)

    def close(self) -> None:
        if self.is_revoked():
            self._connection_lost()
        super().close()
        self.channel.closed = True
        self.redeliveries.closed(self.state.stopping.is_set())
        if self.unacked_counts.get(self.source) == self.unacked_count:
            del self.unacked_counts[self.source]
        # Dramatiq's consumer leaves its connection open if the channel was closed already.
        if self.inner.connection.is_open:
            try:
                self.inner.connection.close()
            except LOST:
                pass
