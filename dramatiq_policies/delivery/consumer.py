"""The consumer that wraps Dramatiq's own: it owns ack, nack, requeue, delayed messages and bodies that can't be read.

A worker calls it where it would call the stock one. What it adds: each message gets a `Delivery`; nothing is acked
before `settlement.settle` has handed on what follows from it; a message goes back to the consumer that delivered it;
delayed messages are moved here, publish first and then ack, and no error of a broker ends a thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from dramatiq import Message
from dramatiq.broker import Consumer, MessageProxy
from dramatiq.common import q_name
from dramatiq.errors import ActorNotFound, BrokerConnectionError, ConnectionClosed

from .. import _dramatiq
from ..common.safe_logger import SafeLogger
from ..errors import MalformedMessage
from ..outcomes import Outcome, OutcomeEvent, text_of
from .decision import Decision
from .delay_queue import DelayQueue
from .delivery import Delivery, OutgoingMessage
from .moving_delayed import Move, attempt, move_due
from .publishing import RETURNED, returned
from .refusals import Distrust, Fault, Parking, Unsendable
from .settlement import settle
from .validation import check_composition, check_shape, clean_options, decode, is_number

if TYPE_CHECKING:
    from .broker_state import BrokerState

__all__ = ["PolicyConsumer", "quiet"]

logger = SafeLogger("dramatiq_policies.outcomes")

#: The message option that says that it was taken from a worker that died. It is gone from the copy that runs.
REDELIVERED = "redelivered"
#: The types of arguments that nobody can change in place.
_FIXED = frozenset({type(None), bool, int, float, str, bytes})


class PolicyConsumer(Consumer):
    """Wraps a consumer of any broker; the subclasses know more of theirs.

    Parameters:
      wiring: The bundle's state on the broker.
      inner: The stock consumer.
      queue_name: The queue that it reads, which may be a delay queue.
    """

    #: Whether `publish_outbox` and the ack are one step for the broker.
    acks_with_outbox = False
    #: How many messages it may hold at once.
    prefetch = 1

    def __init__(self, state: BrokerState, inner: Any, queue_name: str) -> None:
        self.state = state
        self.broker = state.broker
        self.inner = inner
        self.source = queue_name
        self.queue_name = q_name(queue_name)
        self.is_delay_queue = self.source != self.queue_name
        self.delayed = self.delay_queue()
        self.parked = self.parking()
        self.distrust = state.distrusted.setdefault(queue_name, Distrust(queue_name))
        self.max_body_bytes = state.max_body_bytes
        #: Whether the worker shuts down: what still comes is for others. See `quiet`.
        self.is_quiet = False
        self.set_aside: list[MessageProxy] = []

    # What a worker calls.

    def __next__(self) -> MessageProxy | None:
        polled = self.state.last_polled_at
        if polled is not None:
            polled[self.source] = time.monotonic()
        if self.parked:
            self.parked.give_back()
        if self.delayed.queue and not self.has_received() and move_due(self):
            # More are due: do not wait for a message first.
            return None
        message = self.take()
        if message is None:
            return None
        if self.is_delay_queue:
            # A delayed message without a time is due; it must not run from here, where its queue has another name.
            if not is_number(message.options.get("eta")):
                message.options["eta"] = 0
            return message
        if self.is_quiet:
            self.set_aside.append(message)
            return None
        plain = _dramatiq.message_of(message)
        message.delivery = delivery = Delivery(self, plain)  # type: ignore[attr-defined]
        options = plain.options
        clean_options(plain)
        _dramatiq.keep_fields(message, plain)
        # Not by getattr(): a proxy looks for what it has not in its message.
        own = vars(message)
        delivery.body = own.get("body") or _body_of(plain)
        if options.pop(REDELIVERED, None) is not None or own.get("redelivered"):
            delivery.redelivered = True
            delivery.carried = own.get("carried")
        if RETURNED in options and (decision := returned(options)) is not None:
            self._settle_unrun(message, delivery, decision)
            return None
        if "pipe_target" in options or "group_completion_callbacks" in options:
            try:
                check_composition(options)
            except MalformedMessage as error:
                error = _unstacked(error)
                decision = Decision(Outcome.DEAD, "malformed", exception=error, dead_letter=True)
                self._settle_unrun(message, delivery, decision)
                return None
        return message

    def ack(self, message: MessageProxy) -> None:
        delivery: Delivery | None = getattr(message, "delivery", None)
        if delivery is None:
            self.finish(message)
            return
        owner, batched_completions = delivery.consumer, self.state.batched_completions
        if batched_completions is None:
            owner.conclude(message, delivery)
            return
        if not batched_completions.post(owner, message, delivery):
            owner.conclude(message, delivery)
        batched_completions.look()

    def conclude(self, message: MessageProxy, delivery: Delivery) -> None:
        """Settle a message that this consumer has delivered, and ack it."""
        state = self.state
        if delivery.claim is None and delivery.is_plain_success() and not state.successes_observed:
            if state.success_listeners and not delivery.settled:
                delivery.settled = True
                state.notify_success(delivery)
            if not delivery.acked:
                self.finish(message)
        elif settle(state, self, message, delivery):
            self.finish(message)

    def nack(self, message: MessageProxy) -> None:
        delivery: Delivery | None = getattr(message, "delivery", None)
        if delivery is None:
            self.inner.nack(message)
            return
        decision = delivery.decision
        if decision is None or not decision.dead_letter:
            # Failed by somebody else: Dramatiq for an unknown actor, or a middleware of the user's.
            error = _dramatiq.exception_of(message)
            if isinstance(error, ActorNotFound):
                decision = Decision(Outcome.DEAD, "unknown_actor", exception=error, dead_letter=True)
            else:
                decision = Decision(Outcome.SKIPPED, exception=error, dead_letter=True)
            if not delivery.settled:
                delivery.decision = decision
        self.ack(message)

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        held = list(messages)
        try:
            self.put_back(held)
        except Exception as error:
            # While closing, an error would end the thread; the messages come back as after a crash.
            logger.warning("%d messages could not be put back on queue %r: %s", len(held), self.source, error)

    def close(self) -> None:
        if self.state.stopping.is_set():
            self.parked.give_back(everything=True)
            items, self.set_aside = self.set_aside, []
            while (item := self.delayed.take()) is not None:
                items.append(_dramatiq.delayed_message(item))
                self.delayed.task_done()
            self.requeue(items)
        try:
            self.inner.close()
        except BrokerConnectionError:
            pass
        except Exception as error:
            logger.warning("The consumer of queue %r did not close cleanly: %s", self.source, error)

    # What settlement calls.

    def publish_outbox(self, message: MessageProxy, delivery: Delivery, dead: Message[Any] | bytes | None) -> None:
        """Have the broker accept each step, dropping it from the list, and then the dead letter, which may be a body.

        May be called again after any error, and goes on where it stopped.
        """
        steps = delivery.outbox
        while steps:
            step = steps[0]
            assert isinstance(step, OutgoingMessage)
            self.broker.enqueue(step.message, delay=step.delay)
            steps.pop(0)
        if dead is not None:
            self.dead_letter(message, dead)
            delivery.acked = True

    def completes(self, delivery: Delivery) -> bool:
        """Whether `publish_outbox` also completes the idempotency key, and acks, in one step."""
        return False

    def completion(self, delivery: Delivery) -> tuple[tuple[Any, ...], bool]:
        """The command that completes the key of a plain success, for `BatchedCompletions`; and whether it also acks."""
        return delivery.claim.completion(), False

    def dead_letter(self, message: MessageProxy, dead: Message[Any] | bytes) -> None:
        """Move the message to the dead-letter queue; here unannotated, for how it is stored is not known."""
        self.inner.nack(message)

    def finish(self, message: MessageProxy) -> None:
        """Ack it."""
        try:
            self.send_ack(message)
        except Exception as error:
            if not self.lost_connection(error):
                raise
            if self.state.stopping.is_set():
                logger.warning("Message %s was not acked and comes back: %s", message.message_id, error)
                return
            raise ConnectionClosed(error) from None

    def lost_connection(self, error: Exception) -> bool:
        """Whether the error says that the broker can't be reached for now."""
        return isinstance(error, (BrokerConnectionError, OSError))

    def fault_of(self, error: Exception) -> Fault:
        """Why the broker did not take a message."""
        if isinstance(error, Unsendable):
            return Fault.HOPELESS
        return Fault.LOST if self.lost_connection(error) else Fault.REFUSED

    def encoded(self, message: Message[Any]) -> bytes:
        """Encode a message.

        Raises:
          Unsendable: It cannot be encoded, or no worker would decode it.
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
        return self.queue_name in self.state.refused

    def dead_letters_refused(self) -> bool:
        """Remember that the broker refuses this queue's dead letters; whether this is news."""
        news = object()
        return self.state.refused.setdefault(self.queue_name, news) is news

    def dead_letters_accepted(self) -> None:
        """Remember that the broker takes this queue's dead letters."""
        if self.state.refused and self.state.refused.pop(self.queue_name, None) is not None:
            logger.warning("The dead-letter queue of %r takes messages again.", self.queue_name)

    def park(self, message: MessageProxy, wait_ms: float) -> None:
        """Keep a message that the broker takes in no form, and give it back to its queue after the wait."""
        self.parked.park(wait_ms, partial(self.give_back, message))

    def give_back(self, message: MessageProxy) -> None:
        """Have the broker deliver a message again."""
        self.requeue([message])

    def stands_still(self) -> bool:
        """Whether it takes nothing: every slot is taken by a parked message, or it can read nothing."""
        return len(self.parked) >= self.prefetch or self.distrust.is_pausing

    def is_revoked(self) -> bool:
        """Whether the broker has taken back what this consumer delivered."""
        return False

    def will_redeliver(self) -> bool:
        """Whether the broker delivers again what this consumer delivered; not where the queue was deleted."""
        return self.is_revoked()

    def abandon(self, message: MessageProxy) -> None:
        """The message is left to come back."""

    # What a broker's own consumer does otherwise.

    def after_interrupt(self) -> None:
        """Give up what an interrupt may have left in an unknown state on this thread."""

    def take(self) -> MessageProxy | None:
        """The next readable message, or None."""
        try:
            message: MessageProxy | None = next(self.inner)
        except Exception as error:
            if self.lost_connection(error) and not isinstance(error, BrokerConnectionError):
                raise ConnectionClosed(error) from None
            raise
        if message is None:
            return None
        try:
            self.validate(_dramatiq.message_of(message))
        except MalformedMessage as error:
            self.inner.nack(message)
            self.report_malformed(error)
            return None
        return message

    def send_ack(self, message: MessageProxy) -> None:
        """Have the broker take a message off its queue."""
        self.inner.ack(message)

    def put_back(self, messages: list[MessageProxy]) -> None:
        """Put messages that nobody has run back on the queue."""
        self.inner.requeue(messages)

    def has_received(self) -> bool:
        """Whether `take` returns a message without asking the broker."""
        return False

    def move(self, moves: list[Move]) -> None:
        """Enqueue due messages where they are to run, then take them off the delay queue, and mark them as done."""
        for move in moves:
            attempt(self, move, self.move_one)

    def move_one(self, move: Move) -> None:
        self.broker.enqueue(move.moved)
        self.inner.ack(move.message)

    def dead_letter_unmoved(self, message: MessageProxy) -> None:
        """Move a delayed message, as it was delivered, to the dead-letter queue."""
        self.inner.nack(message)

    def delay_queue(self) -> DelayQueue:
        """The delayed messages in hand. They outlive this consumer: no broker was told to give them to another."""
        return self.state.delayed.setdefault(self.source, DelayQueue())

    def parking(self) -> Parking:
        """The messages that keep their slots. They outlive this consumer, as the delayed ones do."""
        return self.state.parked.setdefault(self.source, Parking())

    # Shared by them.

    def decode(self, body: bytes) -> Message[Any]:
        """Decode a body, and check it.

        Raises:
          Exception: It cannot be read.
        """
        message = decode(body, self.max_body_bytes)
        self.validate(message)
        return message

    def validate(self, message: Message[Any]) -> None:
        """Check a message's shape; it belongs to the queue that it was read from, whatever it says."""
        check_shape(message)
        if message.queue_name != self.source:
            object.__setattr__(message, "queue_name", self.source)

    def report_malformed(self, error: MalformedMessage) -> None:
        """Publish the outcome of a body that could not be read and is on the dead-letter queue, raw."""
        event = OutcomeEvent(
            outcome=Outcome.DEAD, reason="malformed", queue=self.queue_name, exception=_unstacked(error)
        )
        self.state.publish(event, None)

    def _settle_unrun(self, message: MessageProxy, delivery: Delivery, decision: Decision) -> None:
        delivery.decision = decision
        message.fail()
        self.nack(message)

    def idle(self, seconds: float) -> None:
        time.sleep(seconds)


def _body_of(message: Message[Any]) -> bytes | None:
    """Encode a message whose broker does not show its body, if a job could change its arguments in place."""
    if all(type(value) in _FIXED for value in (*message.args, *message.kwargs.values())):
        return None
    try:
        return message.encode()
    except Exception:
        return None


def _unstacked(error: MalformedMessage) -> MalformedMessage:
    """The same error without its stack, whose frames are ours and hold what the message carries."""
    # Made anew: before Python 3.11 `sys.exc_info()` keeps the stack of one that is being handled, and Sentry asks that.
    return MalformedMessage(*error.args)


def quiet(worker: Any) -> None:
    """Begin no further job on a worker that shuts down; what it still fetches goes back when it closes.

    Its consumers live on while its jobs end, and an idle thread would take once more what they bring: the very job that
    the shutdown has interrupted and put back, which then nothing interrupts any more.
    """
    for thread in worker.consumers.values():
        if isinstance(thread.consumer, PolicyConsumer):
            thread.consumer.is_quiet = True
