"""The consumer on RabbitMQ.

Hand-offs go over a channel of ours, mandatory and confirmed, on the calling thread's own connection. A dead letter is
published to the dead-letter queue and the message acked after that was confirmed: a crash in between leaves two, never
none. Once this consumer's channel is closed the server has put its messages back, so nothing is handed on for them.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from functools import partial
from typing import Any

import pika
import pika.exceptions
from dramatiq import Message
from dramatiq.broker import MessageProxy
from dramatiq.common import dq_name, q_name, xq_name
from dramatiq.errors import ConnectionClosed

from .. import _dramatiq
from ..consumer import PolicyConsumer
from ..delay_queue import DelayQueue
from ..delivery import Delivery, Send
from ..errors import MalformedMessage
from ..handing_off import RETURNED, wait_before_return
from ..history import now_ms
from ..outcomes import text_of
from ..refusals import Fault, Parking
from ..safe_logger import SafeLogger
from ..struck import drop
from ..wiring import Wiring
from .acks import SharedAcks

__all__ = ["RabbitmqConsumer"]

logger = SafeLogger("dramatiq_policies.outcomes")
alerts = SafeLogger("dramatiq_policies.alerts")

_REFUSED = (pika.exceptions.UnroutableError, pika.exceptions.NackError)
#: Why the server closes a channel: what was published, or declared, is refused for good.
_FOR_GOOD = frozenset({311, 403, 406})
#: The message option of a body that can't be read and waits until the dead-letter queue takes it, in base64.
_UNREADABLE = "unreadable"
_LOST = (pika.exceptions.AMQPConnectionError, pika.exceptions.AMQPChannelError, AssertionError)


class RabbitmqConsumer(PolicyConsumer):
    """Consumes, acks and dead-letters on RabbitMQ."""

    def __init__(self, wiring: Wiring, inner: Any, queue_name: str) -> None:
        super().__init__(wiring, inner, queue_name)
        self.deliveries = _dramatiq.rabbitmq_deliveries(inner)
        self.closed = False
        self.acks = SharedAcks(inner.connection, *_dramatiq.rabbitmq_acks(inner))
        wiring.held[queue_name] = self.held

    def held(self) -> int:
        """How many messages were delivered and not yet acked."""
        return 0 if self.gone() else len(self.inner.known_tags)

    def take(self) -> MessageProxy | None:
        try:
            method, _properties, body = next(self.deliveries)
        except _LOST as error:
            if getattr(error, "reply_code", None) == 404:
                # The queue has disappeared: have it declared again.
                self.broker.queues_pending.add(self.queue_name)  # type: ignore[attr-defined]
            self.closed = True
            raise ConnectionClosed(error) from None
        if body is None:
            return None
        try:
            message: Message[Any] = Message.decode(body)
            self.adopt(message)
        except Exception as error:
            self._dead_letter_raw(method, body, f"the body can't be read: {text_of(error)}")
            return None
        if _UNREADABLE in message.options:
            self._dead_letter_again(method, message)
            return None
        if self.wiring.taken is not None and not self.is_delay_queue and not method.redelivered:
            self.wiring.taken[self.queue_name] = message
        proxy = _dramatiq.rabbitmq_message(self.inner, method, message)
        proxy.body = body  # type: ignore[attr-defined]
        return proxy

    def _dead_letter_raw(self, method: Any, body: bytes, reason: str, times: int = 0) -> None:
        """Move a body that can't be read to the dead letters; where these refuse it, enqueue it again in a message."""
        tag = method.delivery_tag
        try:
            self._publish(xq_name(self.source), body, None)
        except Exception as error:
            if self.fault_of(error) is Fault.LOST:
                raise ConnectionClosed(error) from None
            self._return_raw(tag, body, error, times)
            return
        self.dead_letters_accepted()
        self.inner.channel.basic_ack(tag)
        self.report_malformed(MalformedMessage(reason))

    def _return_raw(self, tag: int, body: bytes, refused: Exception, times: int) -> None:
        if self.dead_letters_refused():
            alerts.critical(
                "The dead-letter queue of %r would not take a body that can't be read (%s: %s). The body is enqueued again: "
                "make room in the dead-letter queue.",
                self.queue_name,
                type(refused).__name__,
                text_of(refused),
            )
        wait = wait_before_return(times)
        options = {_UNREADABLE: b64encode(body).decode(), RETURNED: times + 1}
        try:
            self._enqueue(Send(Message(self.queue_name, "?", (), {}, options), wait))
        except Exception as error:
            if self.fault_of(error) is Fault.LOST:
                raise ConnectionClosed(error) from None
            logger.error("A body that can't be read keeps its slot for %d ms: %s", wait, text_of(error))  # noqa: TRY400
            self.parked.park(wait, partial(self._nack, tag))
        else:
            self.inner.channel.basic_ack(tag)

    def _dead_letter_again(self, method: Any, message: Message[Any]) -> None:
        try:
            body = b64decode(message.options[_UNREADABLE], validate=True)
            times = int(message.options[RETURNED])
        except Exception:
            body, times = message.encode(), 0
        self._dead_letter_raw(method, body, "the body can't be read", times)

    def give_back(self, message: MessageProxy) -> None:
        tag = _dramatiq.take_rabbitmq_tag(self.inner, message)
        if tag is not None:
            self._nack(tag)

    def _nack(self, tag: int) -> None:
        if not self.gone():
            try:
                self.inner.channel.basic_nack(tag, requeue=True)
            except _LOST as error:
                raise ConnectionClosed(error) from None

    def hand_off(self, message: MessageProxy, delivery: Delivery, dead: Message[Any] | bytes | None) -> None:
        if self.gone() and not delivery.is_remembered():
            raise ConnectionClosed("the consumer that delivered this message is closed")
        steps = delivery.steps
        while steps:
            step = steps[0]
            assert isinstance(step, Send)
            self._enqueue(step)
            steps.pop(0)
        if isinstance(dead, bytes):
            self._publish(xq_name(self.source), dead, None)
        elif dead is not None:
            self._publish(xq_name(self.source), self.encoded(dead), dead.options.get("broker_priority"))

    def _enqueue(self, step: Send) -> None:
        """What ``RabbitmqBroker.enqueue`` does, but mandatory and confirmed."""
        self._encode(step)
        self._publish(step.message.queue_name, step.encoded, step.message.options.get("broker_priority"))
        self.broker.emit_after("enqueue", step.message, step.delay)

    def _encode(self, step: Send) -> None:
        if step.encoded is None:
            message, delay = step.message, step.delay
            if delay is not None:
                message = message.copy(queue_name=dq_name(message.queue_name), options={"eta": now_ms() + delay})
            self.broker.emit_before("enqueue", message, delay)
            step.message, step.encoded = message, self.encoded(message)

    def _publish(self, queue: str, body: bytes, priority: int | None) -> None:
        broker: Any = self.broker
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
        except _REFUSED:
            raise
        except Exception:
            # The next try opens a new connection.
            del broker.connection
            raise

    def _channel(self) -> Any:
        """This thread's confirmed channel, on the connection that the broker keeps for this thread."""
        broker: Any = self.broker
        connection = broker.connection
        channel = getattr(broker.state, "dramatiq_policies_channel", None)
        if channel is None or channel.connection is not connection or not channel.is_open:
            channel = connection.channel()
            channel.confirm_delivery()
            broker.state.dramatiq_policies_channel = channel
        return channel

    def after_interrupt(self) -> None:
        """Forget this thread's connection: a send of the job's may have been struck, and its confirm never come.

        The next one who needs it opens another. What the job had sent may have been confirmed or not.
        """
        broker: Any = self.broker
        broker.state.dramatiq_policies_channel = None
        drop(_dramatiq.take_rabbitmq_connection(broker))

    def finish(self, message: MessageProxy) -> None:
        if self.gone():
            logger.warning("Message %s lost its connection before its ack and is delivered again.", message.message_id)
            return
        super().finish(message)

    def send_ack(self, message: MessageProxy) -> None:
        tag = _dramatiq.take_rabbitmq_tag(self.inner, message)
        if tag is None:
            logger.warning("Message %s was acked already.", message.message_id)
        else:
            self.acks.put(tag)

    def parking(self) -> Parking:
        # The server gives the messages of a closed consumer out again.
        return Parking()

    def delay_queue(self) -> DelayQueue:
        # The server gives the delayed messages of a closed consumer out again.
        return DelayQueue()

    def put_back(self, messages: list[MessageProxy]) -> None:
        """The server does it when the consumer closes."""

    def gone(self) -> bool:
        return self.closed or not self.inner.channel.is_open or not self.inner.connection.is_open

    def fault_of(self, error: Exception) -> Fault:
        if isinstance(error, pika.exceptions.ChannelClosedByBroker) and error.reply_code in _FOR_GOOD:
            return Fault.HOPELESS
        return super().fault_of(error)

    def lost_connection(self, error: Exception) -> bool:
        if isinstance(error, _REFUSED):
            return False
        return isinstance(error, _LOST) or super().lost_connection(error)

    def close(self) -> None:
        super().close()
        self.closed = True
        if self.wiring.held.get(self.source) == self.held:
            del self.wiring.held[self.source]
        # The stock consumer leaves its connection open if its channel was closed already.
        if self.inner.connection.is_open:
            try:
                self.inner.connection.close()
            except _LOST:
                pass
