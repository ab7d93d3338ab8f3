"""Unreadable bodies on RabbitMQ become dead letters as received; a worker that can read none stops taking messages.

If the dead-letter queue refuses the body, the body is enqueued again inside a message. The message waits on the delay queue
and takes no slot.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from functools import partial
from typing import Any

import pika.exceptions
from dramatiq import Message
from dramatiq.broker import MessageProxy
from dramatiq.common import xq_name
from dramatiq.errors import ConnectionClosed

from ...common.safe_logger import SafeLogger
from ...delivery.outgoing import OutgoingMessage
from ...delivery.refusals import IN_A_ROW, Fault
from ...delivery.returned import RETURNED, wait_before_return
from ...delivery.transport import Transport
from ...errors import MalformedMessage
from ...outcomes import text_of

__all__ = ["LOST", "UNREADABLE", "UnreadableBodies"]

logger = SafeLogger("dramatiq_policies.outcomes")
alerts = SafeLogger("dramatiq_policies.alerts")

LOST = (pika.exceptions.AMQPConnectionError, pika.exceptions.AMQPChannelError, AssertionError)
#: The message option with an unreadable body, in base64, that waits for the dead-letter queue.
UNREADABLE = "unreadable_body"
#: How many seconds to serve the connection at a time during a pause.
_SERVE = 1.0


class UnreadableBodies(Transport):
    """The transport's part for unreadable bodies."""

    deliveries: Any
    closed: bool

    def unreadable(self, tag: int, properties: Any, body: bytes, error: Exception) -> None:
        """Dead-letter an unreadable body, or leave the body on its queue during a pause."""
        was_pausing = self.distrust.is_pausing
        if self.distrust.unreadable(error):
            if not was_pausing:
                self._stop_taking()
            self._leave(tag, properties, body)
        else:
            self._dead_letter_raw(tag, body, f"the body is unreadable: {text_of(error)}")
            if self.distrust.is_pausing:
                self._stop_taking()

    def _stop_taking(self) -> None:
        """Cancel the consumer: the server delivers prefetched messages to other workers."""
        self.on_connection(self.inner.channel.cancel)

    def _leave(self, tag: int, properties: Any, body: bytes) -> None:
        """Move a body to the end of the queue."""
        try:
            self.publish(self.source, body, properties.priority)
        except Exception as error:
            if self.fault_of(error) is Fault.LOST:
                raise ConnectionClosed(error) from None
            self.nack_here(tag)
        else:
            self.ack_here(tag)

    def look_again(self) -> MessageProxy | None:
        """Serve the connection during a pause; after the pause try some messages, and go on after a readable one."""
        left = self.distrust.seconds_left()
        if left or self.is_quiet:
            self.on_connection(self.inner.connection.process_data_events, min(left or _SERVE, _SERVE))
            return None
        for _ in range(IN_A_ROW):
            method, properties, body = self.on_connection(self.inner.channel.basic_get, self.source)
            if method is None:
                break
            message = self.received(method, properties, body)
            if not self.distrust.is_pausing:
                logger.warning("The worker can read the messages of queue %r again.", self.source)
                self.deliveries = self.inner.iterator = self.inner.channel.consume(
                    self.source, inactivity_timeout=_SERVE
                )
                return message
        self.on_connection(self.inner.connection.process_data_events, _SERVE)
        return None

    def received(self, method: Any, properties: Any, body: bytes) -> MessageProxy | None:
        raise NotImplementedError

    def publish(self, queue: str, body: bytes, priority: int | None) -> None:
        raise NotImplementedError

    def enqueue(self, step: OutgoingMessage) -> None:
        raise NotImplementedError

    def ack_here(self, tag: int) -> None:
        """Acknowledge, on the thread of this consumer's connection."""
        self.on_connection(self.inner.channel.basic_ack, tag)

    def nack_here(self, tag: int) -> None:
        """Return a message to its queue, on the thread of this consumer's connection."""
        if not self.is_revoked():
            self.on_connection(partial(self.inner.channel.basic_nack, requeue=True), tag)

    def on_connection(self, call: Any, *args: Any) -> Any:
        """Use this consumer's connection."""
        try:
            return call(*args)
        except (*LOST, OSError) as error:
            self.closed = True
            raise ConnectionClosed(error) from None

    def _dead_letter_raw(self, tag: int, body: bytes, reason: str, times: int = 0) -> None:
        """Move a body to the dead-letter queue, or enqueue the body again in a message if that queue refuses."""
        try:
            self.publish(xq_name(self.source), body, None)
        except Exception as error:
            if self.fault_of(error) is Fault.LOST:
                raise ConnectionClosed(error) from None
            self._return_raw(tag, body, error, times)
            return
        self.dead_letters_accepted()
        self.ack_here(tag)
        self.report_malformed(MalformedMessage(reason))

    def _return_raw(self, tag: int, body: bytes, refused: Exception, times: int) -> None:
        if self.dead_letters_refused():
            alerts.critical(
                "The dead-letter queue of %r refused an unreadable body (%s: %s). The worker enqueues the "
                "body again: make room in the dead-letter queue.",
                self.queue_name,
                type(refused).__name__,
                text_of(refused),
            )
        wait = wait_before_return(times)
        options = {UNREADABLE: b64encode(body).decode(), RETURNED: times + 1}
        try:
            self.enqueue(OutgoingMessage(Message(self.queue_name, "?", (), {}, options), wait))
        except Exception as error:
            if self.fault_of(error) is Fault.LOST:
                raise ConnectionClosed(error) from None
            logger.error("An unreadable body blocks a prefetch slot for %d ms: %s", wait, text_of(error))  # noqa: TRY400
            self.parked.park(wait, partial(self.nack_here, tag))
        else:
            self.ack_here(tag)

    def dead_letter_again(self, tag: int, message: Message[Any]) -> None:
        """Try again to move a refused body to the dead-letter queue."""
        try:
            body = b64decode(message.options[UNREADABLE], validate=True)
            times = int(message.options[RETURNED])
        except Exception:
            body, times = message.encode(), 0
        self._dead_letter_raw(tag, body, "the body is unreadable", times)
