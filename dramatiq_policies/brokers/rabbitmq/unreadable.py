"""Unreadable bodies on RabbitMQ become dead letters as received; a worker that can read none stops taking messages.

If the dead-letter queue refuses the body, the body is enqueued again inside a message. The message waits on the delay queue
and takes no slot.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable
from functools import partial
from typing import Any

from dramatiq import Message
from dramatiq.broker import MessageProxy
from dramatiq.common import xq_name
from dramatiq.errors import ConnectionClosed

from ...common.durations import format_duration
from ...common.safe_logger import SafeLogger
from ...delivery.outgoing import OutgoingMessage
from ...delivery.refusals import IN_A_ROW, Fault
from ...delivery.returned import RETURNED, wait_before_return
from ...delivery.transport import Transport
from ...errors import MalformedMessage
from ...outcomes import text_of
from .channel import ConsumerChannel
from .publisher import ConfirmedPublisher

__all__ = ["UNREADABLE", "UnreadableBodies"]

logger = SafeLogger("dramatiq_policies.outcomes")
alerts = SafeLogger("dramatiq_policies.alerts")

#: The message option with an unreadable body, in base64, that waits for the dead-letter queue.
UNREADABLE = "unreadable_body"
#: How many seconds to serve the connection at a time during a pause.
_SERVE = 1.0


class UnreadableBodies:
    """Settles the unreadable bodies of one consumer.

    Parameters:
      transport: The transport of the consumer.
      channel: The channel that delivers the bodies.
      publisher: Publishes to the dead-letter queue.
    """

    def __init__(self, transport: Transport, channel: ConsumerChannel, publisher: ConfirmedPublisher) -> None:
        self._transport = transport
        self._breaker = transport.breaker
        self._queue = transport.source
        self._channel = channel
        self._publisher = publisher

    def settle(self, tag: int, properties: object, body: bytes, error: Exception) -> None:
        """Dead-letter an unreadable body, or leave the body on its queue during a pause."""
        was_pausing = self._breaker.is_pausing
        if self._breaker.unreadable(error):
            if not was_pausing:
                self._channel.cancel()
            self._leave(tag, properties, body)
        else:
            self._dead_letter(tag, body, f"the body is unreadable: {text_of(error)}")
            if self._breaker.is_pausing:
                self._channel.cancel()

    def _leave(self, tag: int, properties: Any, body: bytes) -> None:
        """Move a body to the end of the queue."""
        try:
            self._publisher.publish(self._queue, body, properties.priority)
        except Exception as error:
            if self._transport.fault_of(error) is Fault.LOST:
                raise ConnectionClosed(error) from None
            self._channel.nack(tag)
        else:
            self._channel.ack(tag)

    def poll_paused(self, receive: Callable[[Any, Any, bytes], MessageProxy | None]) -> MessageProxy | None:
        """Serve the connection during a pause; after the pause try some messages, and go on after a readable one.

        Parameters:
          receive: Returns the message of one delivery; None if the body is unreadable.
        """
        left = self._breaker.seconds_left()
        if left or self._transport.is_quiet:
            self._channel.serve(min(left or _SERVE, _SERVE))
            return None
        for _ in range(IN_A_ROW):
            method, properties, body = self._channel.get(self._queue)
            if method is None:
                break
            message = receive(method, properties, body)
            if not self._breaker.is_pausing:
                logger.warning("The worker can read the messages of queue %r again.", self._queue)
                self._channel.consume(self._queue, _SERVE)
                return message
        self._channel.serve(_SERVE)
        return None

    def dead_letter_again(self, tag: int, message: Message[Any]) -> None:
        """Try again to move a refused body to the dead-letter queue."""
        try:
            body = b64decode(message.options[UNREADABLE], validate=True)
            times = int(message.options[RETURNED])
        except Exception:
            body, times = message.encode(), 0
        self._dead_letter(tag, body, "the body is unreadable", times)

    def _dead_letter(self, tag: int, body: bytes, reason: str, times: int = 0) -> None:
        """Move a body to the dead-letter queue, or enqueue the body again in a message if that queue refuses."""
        try:
            self._publisher.publish(xq_name(self._queue), body, None)
        except Exception as error:
            if self._transport.fault_of(error) is Fault.LOST:
                raise ConnectionClosed(error) from None
            self._enqueue_again(tag, body, error, times)
            return
        self._transport.dead_letters_accepted()
        self._channel.ack(tag)
        self._transport.report_malformed(MalformedMessage(reason))

    def _enqueue_again(self, tag: int, body: bytes, refused: Exception, times: int) -> None:
        queue_name = self._transport.queue_name
        if self._transport.dead_letters_refused():
            alerts.critical(
                "The dead-letter queue of %r refused an unreadable body (%s: %s). The worker enqueues the "
                "body again: make room in the dead-letter queue.",
                queue_name,
                type(refused).__name__,
                text_of(refused),
            )
        wait = wait_before_return(times)
        options = {UNREADABLE: b64encode(body).decode(), RETURNED: times + 1}
        try:
            self._publisher.enqueue(OutgoingMessage(Message(queue_name, "?", (), {}, options), wait))
        except Exception as error:
            if self._transport.fault_of(error) is Fault.LOST:
                raise ConnectionClosed(error) from None
            logger.error(  # noqa: TRY400
                "RabbitMQ refuses an unreadable body of queue %r in every form (%s). The body holds a slot of this worker for %s, "
                "and then returns to the queue: make room in the dead-letter queue.",
                queue_name,
                text_of(error),
                format_duration(wait),
            )
            self._transport.parked.park(wait, partial(self._channel.nack, tag))
        else:
            self._channel.ack(tag)
