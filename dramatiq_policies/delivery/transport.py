"""The broker's side of one consumer: how messages are taken, published, acknowledged and dead-lettered.

`Transport` serves any broker through Dramatiq's own consumer. The packages in `brokers` hold a subclass for each broker
with a known storage. `PolicyConsumer` is the worker's side, and has a transport.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from dramatiq import Message
from dramatiq.broker import MessageProxy
from dramatiq.common import q_name
from dramatiq.errors import BrokerConnectionError, ConnectionClosed

from .. import _dramatiq
from ..common.plurals import counted
from ..common.safe_logger import SafeLogger
from ..errors import MalformedMessage
from ..interrupts.listeners import notify_interrupt
from ..outcomes import Outcome, OutcomeEvent, text_of
from .delay_queue import DelayQueue, Move
from .delivery import Delivery
from .direct import enqueue_directly
from .refusals import Fault, Parking, Unsendable
from .validation import check_shape, decode, without_stack

if TYPE_CHECKING:
    from .broker_state import BrokerState

__all__ = ["Transport"]

logger = SafeLogger("dramatiq_policies.outcomes")


class Transport:
    """Speaks to the broker for one consumer.

    Parameters:
      state: The shared state of the broker.
      inner: Dramatiq's own consumer.
      queue_name: The queue to read, which may be a delay queue.
      prefetch: How many messages the consumer may have in hand.
    """

    #: Whether `publish_follow_ups` also acknowledges, in the same step of the broker.
    acks_with_follow_ups = False
    #: Whether the broker redelivers the messages of a lost connection. If not, it still counts them as ours after a reconnect.
    redelivers_on_reconnect = False

    def __init__(self, state: BrokerState, inner: Any, queue_name: str, prefetch: int) -> None:
        self.state = state
        self.broker = state.broker
        self.inner = inner
        #: The queue to read; `queue_name` is the work queue, also for a delay queue.
        self.source = queue_name
        self.queue_name = q_name(queue_name)
        self.is_delay_queue = self.source != self.queue_name
        self.prefetch = prefetch
        queue = state.queue(queue_name)
        self.delayed = DelayQueue() if self.redelivers_on_reconnect else queue.delayed
        self.parked = Parking() if self.redelivers_on_reconnect else queue.parked
        self.breaker = queue.breaker
        #: Of the work queue: a delay queue has no dead-letter queue of its own.
        self.dead_letters = state.queue(self.queue_name).dead_letters
        self.max_body_bytes = state.settings.max_body_bytes
        #: Set while the worker shuts down: messages that still arrive are left to other workers.
        self.is_quiet = False

    # Taking messages.

    def take(self) -> MessageProxy | None:
        """Return the next readable message, or None if none arrived for a while.

        The proxy has the message's fields as attributes, and three others, which `PolicyConsumer` moves to the `Delivery`: ``body``
        (the bytes as received), ``redelivered`` (another worker may have begun the message) and ``earlier_run`` (an
        `EarlierRun`). `_dramatiq.cache_fields` sets them.
        """
        try:
            message: MessageProxy | None = next(self.inner)
        except Exception as error:
            if self.lost_connection(error) and not isinstance(error, BrokerConnectionError):
                raise ConnectionClosed(error) from None
            raise
        if message is None:
            return None
        plain = _dramatiq.message_of(message)
        try:
            self.validate(plain)
        except MalformedMessage as error:
            self.inner.nack(message)
            self.report_malformed(error)
            return None
        _dramatiq.cache_missing_fields(message, plain)
        return message

    def has_received(self) -> bool:
        """Whether `take` returns a message without asking the broker."""
        return False

    @property
    def outstanding_message_count(self) -> int:
        """How many messages are in hand, where Dramatiq's consumer counts them."""
        count: int = self.inner.outstanding_message_count
        return count

    def decode(self, body: bytes) -> Message[Any]:
        """Decode and validate a body.

        Raises:
          Exception: The body can't be read.
        """
        message = decode(body, self.max_body_bytes)
        self.validate(message)
        return message

    def validate(self, message: Message[Any]) -> None:
        """Check a message's shape, and set the queue name to the queue read from."""
        check_shape(message)
        if message.queue_name != self.source:
            object.__setattr__(message, "queue_name", self.source)

    def report_malformed(self, error: MalformedMessage) -> None:
        """Publish the outcome of an unreadable body, now raw on the dead-letter queue."""
        event = OutcomeEvent(
            outcome=Outcome.DEAD, reason="malformed", queue=self.queue_name, exception=without_stack(error)
        )
        self.state.outcomes.publish(event, None)

    def idle(self, seconds: float) -> None:
        time.sleep(seconds)

    # Publishing, and the end of a message.

    def publish_follow_ups(self, message: MessageProxy, delivery: Delivery, dead: Message[Any] | bytes | None) -> None:
        """Publish the follow-up messages, and then the dead letter (a message, or a raw body).

        Each message that the broker has accepted leaves the list: after an error, call this again to go on.
        """
        outgoing = delivery.outgoing
        while outgoing:
            enqueue_directly(self.broker, outgoing[0].message, outgoing[0].delay)
            outgoing.pop(0)
        if dead is not None:
            self.dead_letter(message, dead)
            delivery.acked = True

    def completes_with_publish(self, delivery: Delivery) -> bool:
        """Whether `publish_follow_ups` also completes the idempotency key and acknowledges, in a single step."""
        return False

    def completion_command(self, delivery: Delivery) -> tuple[tuple[Any, ...], bool]:
        """Return the command to complete the key of a plain success, and whether the command also acknowledges."""
        return self.state.idempotency.claims.completion_command(delivery.claim), False

    def acked_by_completion(self, delivery: Delivery, reply: object) -> None:
        """The command of `completion_command` has acknowledged the message, with this reply."""
        delivery.acked = True

    def dead_letter(self, message: MessageProxy, dead: Message[Any] | bytes) -> None:
        """Move the message to the dead-letter queue; without the failure, since the broker's storage is not known."""
        self.inner.nack(message)

    def ack(self, message: MessageProxy) -> None:
        """Acknowledge a message.

        Raises:
          ConnectionClosed: The connection is lost, and the worker goes on.
        """
        try:
            self.send_ack(message)
        except Exception as error:
            if not self.lost_connection(error):
                raise
            if not self.state.stopping.is_set():
                raise ConnectionClosed(error) from None
            self.report_unacked(message, error)

    def report_unacked(self, message: MessageProxy, error: Exception) -> None:
        """Log that a message could not be acknowledged before the worker ends."""
        logger.warning(
            "Message %s of actor %s could not be acknowledged and will be redelivered: %s",
            message.message_id,
            message.actor_name,
            error,
        )

    def send_ack(self, message: MessageProxy) -> None:
        """Tell the broker to remove a message from the queue."""
        self.inner.ack(message)

    def nack(self, message: MessageProxy) -> None:
        """Move a message that has no delivery to the dead-letter queue, as plain Dramatiq does."""
        self.inner.nack(message)

    def requeue(self, messages: list[MessageProxy]) -> None:
        """Put messages not yet begun by a thread back on the queue."""
        self.inner.requeue(messages)

    def try_requeue(self, messages: list[MessageProxy]) -> None:
        """Requeue messages; log an error, after which they come back as after a crash."""
        try:
            self.requeue(messages)
        except Exception as error:
            # Dramatiq calls this while it closes a consumer: an error would end the thread.
            logger.warning(
                "%s could not be requeued on queue %r (%s). The broker redelivers them later.",
                counted(len(messages), "message"),
                self.source,
                error,
            )

    def return_to_queue(self, message: MessageProxy) -> None:
        """Have the broker deliver a message again."""
        self.try_requeue([message])

    def abandon(self, message: MessageProxy) -> None:
        """Leave a message unacknowledged, so that the broker redelivers the message."""

    def park(self, message: MessageProxy, wait_ms: float) -> None:
        """Keep a message in its slot, because the broker accepts the message in no form. Give it back after the wait."""
        self.parked.park(wait_ms, partial(self.return_to_queue, message))

    def after_interrupt(self) -> None:
        """Drop connections of this thread that an interrupt of a job may have left in an unknown state."""
        notify_interrupt()

    def close(self) -> None:
        """Close Dramatiq's consumer. Never raises."""
        try:
            self.inner.close()
        except BrokerConnectionError:
            pass
        except Exception as error:
            logger.warning("The consumer of queue %r could not close cleanly: %s", self.source, error)

    # Errors and refusals.

    def lost_connection(self, error: Exception) -> bool:
        """Whether the error means that the broker is unreachable for now."""
        return isinstance(error, (BrokerConnectionError, OSError))

    def fault_of(self, error: Exception) -> Fault:
        """Return why the broker did not accept a message."""
        if isinstance(error, Unsendable):
            return Fault.PERMANENT
        return Fault.LOST if self.lost_connection(error) else Fault.REFUSED

    def encoded(self, message: Message[Any]) -> bytes:
        """Encode a message.

        Raises:
          Unsendable: The message can't be encoded, or is too large for any worker to decode.
        """
        try:
            body = message.encode()
            if self.max_body_bytes is None or len(body) <= self.max_body_bytes:
                return body
            error: Exception = MalformedMessage(f"{len(body)} bytes; max_body_bytes is {self.max_body_bytes}")
        except Exception as refusal:
            error = refusal
        raise Unsendable(f"the message cannot be encoded: {type(error).__name__}: {text_of(error)}") from error

    @property
    def refuses_dead_letters(self) -> bool:
        """Whether the broker refused the last dead letter of this queue."""
        return self.dead_letters.active

    def dead_letters_refused(self) -> bool:
        """Remember that the broker refuses this queue's dead letters. Returns whether this is a change."""
        return self.dead_letters.begin()

    def dead_letters_accepted(self) -> None:
        """Remember that the broker accepts this queue's dead letters. Logs a change."""
        if self.dead_letters.end():
            logger.warning("The dead-letter queue of %r accepts messages again.", self.queue_name)

    def is_revoked(self) -> bool:
        """Whether the broker has taken back every message that this consumer delivered."""
        return False

    def will_redeliver(self) -> bool:
        """Whether the broker redelivers the messages of this consumer; False after the queue was deleted."""
        return self.is_revoked()

    def is_stalled(self) -> bool:
        """Whether the consumer takes no messages: parked messages fill every slot, or no body is readable."""
        return len(self.parked) >= self.prefetch or self.breaker.is_pausing

    # Delayed messages.

    def move(self, moves: list[Move]) -> None:
        """Publish due messages to the work queue, remove them from the delay queue, and mark them as done."""
        for move in moves:
            self.try_move(move, self.move_one)

    def try_move(self, move: Move, call: Callable[[Move], object]) -> None:
        """Move one message by ``call``. An error delays this message only, unless the connection is lost."""
        try:
            call(move)
            move.done = True
        except Exception as error:
            if self.fault_of(error) is Fault.LOST:
                raise
            move.error = error

    def move_one(self, move: Move) -> None:
        enqueue_directly(self.broker, move.moved)
        self.inner.ack(move.message)

    def dead_letter_unmoved(self, message: MessageProxy) -> None:
        """Move a delayed message, as it was delivered, to the dead-letter queue."""
        self.inner.nack(message)
