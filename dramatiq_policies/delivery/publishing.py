"""Publish the follow-up messages and the dead letter of a delivery, until the broker has accepted all of them.

Each try fails in one of three ways (see `Fault`). After a lost connection the worker tries again until the broker is back, and
accepts the messages. Other refusals escalate, after five seconds or at once if the refusal is permanent:

1. Drop the follow-up messages (a retry, a next step). The message becomes a dead letter, reason ``handoff_failed``.
2. Make the dead letter small: no traceback, no history.
3. Publish the body as received for a dead letter. This needs no encoding.
4. Enqueue the message again with its failure, after a growing wait. The job does not run: the next worker continues here.
   The message takes no slot meanwhile.
5. If the broker refuses even that, keep the message in its slot for the wait, and then return the message to its queue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..common import clock
from ..common.safe_logger import SafeLogger
from ..errors import HandoffFailed
from ..outcomes import Outcome, text_of
from .decision import Decision
from .delivery import Delivery, DeliveryReassigned
from .history import FAILURE, POLICIES, History, attempt_of, failure_of, now_ms, replays_of
from .outgoing import OutgoingMessage
from .refusals import Fault
from .returned import RETURNED, wait_before_return

if TYPE_CHECKING:
    from dramatiq import Message
    from dramatiq.broker import MessageProxy

    from .broker_state import BrokerState
    from .transport import Transport

__all__ = ["FollowUpPublisher"]

logger = SafeLogger("dramatiq_policies.outcomes")
alerts = SafeLogger("dramatiq_policies.alerts")

#: Seconds between tries. The second try is immediate, since idle connections are often closed.
_RETRY_PAUSES = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0)
#: How many seconds to repeat a publish that the broker refuses.
_RETRY_REFUSAL_FOR = 5.0
#: Outcomes after which the same message is enqueued for another run.
_REENQUEUED_OUTCOMES = frozenset({Outcome.RETRIED, Outcome.DEFERRED})


class FollowUpPublisher:
    """Publishes the follow-up messages and the dead letter of one delivery."""

    def __init__(
        self,
        state: BrokerState,
        transport: Transport,
        message: MessageProxy,
        delivery: Delivery,
        decision: Decision,
    ) -> None:
        self.state = state
        self.transport = transport
        self.message = message
        self.delivery = delivery
        self.decision = decision
        #: The dead letter, a message or the body as received.
        self.dead: Message[Any] | bytes | None = None
        self.small = False
        #: Whether step 4 has begun.
        self.returning = False
        self.tries = 0
        self.first_refusal: float | None = None

    def run(self) -> Decision:
        """Publish until the broker has accepted everything. Returns the final decision."""
        if self.decision.outcome is not Outcome.SUCCEEDED and self._is_redelivered():
            # Another worker runs the message: each follow-up message would be published twice.
            return self._give_up(ConnectionError("the consumer's connection is closed"))
        while True:
            try:
                self._try()
                return self.decision
            except Exception as error:
                if isinstance(error, DeliveryReassigned) or self._is_redelivered():
                    return self._give_up(error)
                if self._is_futile(error):
                    if self.returning:
                        return self._park(error)
                    try:
                        self._escalate(error)
                    except Exception as another:
                        logger.exception(
                            "The worker could make no dead letter of message %s of actor %r. The message is not acknowledged, and "
                            "the broker redelivers the message later.",
                            self.message.message_id,
                            self.message.actor_name,
                        )
                        return self._give_up(another)
                    self.first_refusal, self.tries = None, 0
                    continue
                if self.tries == 0:
                    logger.warning(
                        "The follow-up messages of message %s of actor %r could not be published (%s: "
                        "%s); the worker tries again.",
                        self.message.message_id,
                        self.message.actor_name,
                        type(error).__name__,
                        text_of(error),
                    )
                pause = _RETRY_PAUSES[min(self.tries, len(_RETRY_PAUSES) - 1)]
                self.tries += 1
                if self.state.stopping.wait(pause) and self.tries > 1:
                    return self._give_up(error)

    def _try(self) -> None:
        transport, delivery = self.transport, self.delivery
        if self.decision.dead_letter and self.dead is None:
            self.dead = self._dead_letter()
        if delivery.follow_ups or self.dead is not None or transport.completes_with_publish(delivery):
            _resolve(delivery)
            self._mark_retry_pending()
            transport.publish_follow_ups(self.message, delivery, self.dead)
        if self.dead is not None:
            transport.dead_letters_accepted()

    def _is_redelivered(self) -> bool:
        """Whether the broker has returned this message to its queue already."""
        return self.transport.will_redeliver() and not self.delivery.completes_key()

    def _is_futile(self, error: Exception) -> bool:
        """Whether to escalate, and not to repeat the same try."""
        fault = self.transport.fault_of(error)
        if fault is Fault.LOST or (fault is Fault.REFUSED and self.transport.will_redeliver()):
            # A dead letter cannot replace a message that the broker has taken back, and another run would double the effect.
            return False
        now = clock.monotonic()
        if self.first_refusal is None:
            self.first_refusal = now
        # The queue refused the last dead letter, too: five seconds of tries for each would hold up the worker.
        known = self.decision.dead_letter and (self.transport.refuses_dead_letters or RETURNED in self.message.options)
        return fault is Fault.PERMANENT or known or self.returning or now - self.first_refusal >= _RETRY_REFUSAL_FOR

    def _escalate(self, error: Exception) -> None:
        """Take the next step of the list above."""
        delivery, decision = self.delivery, self.decision
        permanent = self.transport.fault_of(error) is Fault.PERMANENT
        if not decision.dead_letter or (delivery.follow_ups and not self._is_dead_letter_at_fault(permanent)):
            self._alert(
                "The broker refused the follow-up messages of message %s of actor %r (%s: %s); the "
                "message goes to the dead-letter queue.",
                error,
            )
            delivery.follow_ups = None
            if not decision.dead_letter:
                self.decision = delivery.decision = self._failed(error)
                self.message.fail()
            self.dead = None
        elif permanent and not self.small and not isinstance(self.dead, bytes):
            self.small, self.dead = True, None
        elif permanent and delivery.body is not None and not isinstance(self.dead, bytes):
            self.dead = delivery.body
        else:
            self._return(error)

    def _is_dead_letter_at_fault(self, permanent: bool) -> bool:
        """Whether the dead letter, and no follow-up message, can never be sent."""
        encoded = all(
            isinstance(follow_up, OutgoingMessage) and follow_up.encoded is not None
            for follow_up in self.delivery.follow_ups or ()
        )
        # On other brokers the dead letter is published after the follow-up messages.
        return permanent and encoded and self.transport.acks_with_follow_ups and not isinstance(self.dead, bytes)

    def _failed(self, error: Exception) -> Decision:
        """Return the decision on a message whose follow-up messages were refused."""
        decision = self.decision
        stand_in = HandoffFailed(f"{type(error).__name__}: {text_of(error)}")
        stand_in.__cause__ = error
        if decision.outcome is Outcome.RETRIED and decision.exception is not None:
            # The retry would have carried this failure in its history; now the dead letter does.
            history = History(self.message.options)
            history.attempt = decision.attempt or history.attempt
            history.failed(decision.exception, now_ms(), None)
            self.message.options[POLICIES] = history.option()
        return Decision(
            Outcome.DEAD,
            "handoff_failed",
            exception=stand_in,
            rule=decision.rule,
            attempt=decision.attempt,
            dead_letter=True,
        )

    def _dead_letter(self) -> Message[Any]:
        message = self.message
        failure = message.options[FAILURE] if RETURNED in message.options else self._failure()
        sent = self.delivery.received_message() if self.small else None
        # The job may have put values into the options that can't be encoded.
        dead: Message[Any] = (message if sent is None else sent).copy(queue_name=self.transport.queue_name)
        dead.options.pop(POLICIES, None)
        dead.options.pop(RETURNED, None)
        if replays := replays_of(message.options) - (RETURNED in message.options):
            dead.options[POLICIES] = {"replays": replays}
        dead.options[FAILURE] = {**failure, "traceback": None, "history": []} if self.small else failure
        return dead

    def _failure(self) -> dict[str, Any]:
        policy = self.state.policies.get(self.message.actor_name)
        return failure_of(self.decision, self.message.options, None if policy is None else policy.tags)

    def _return(self, error: Exception) -> None:
        """Enqueue the message again with its failure (step 4)."""
        options = self.message.options
        times = options.get(RETURNED, 0)
        wait = wait_before_return(times)
        if self.transport.dead_letters_refused():
            self._alert(
                "The dead-letter queue refused message %s of actor %r (%s: %s). The worker enqueues this "
                "message and further refused messages again, without a run: make room in the dead-letter "
                "queue.",
                error,
            )
        failure = options[FAILURE] if times else self._failure()
        if self.small:
            failure = {**failure, "traceback": None, "history": []}
        again = self.delivery.next_message(**{FAILURE: failure, RETURNED: times + 1})
        self.returning, self.dead = True, None
        self.delivery.follow_ups = [OutgoingMessage(again, wait)]
        self.decision = self.delivery.decision = Decision(
            Outcome.INTERRUPTED,
            "handoff_failed",
            exception=error,
            attempt=self.decision.attempt or attempt_of(options),
            delay_ms=wait,
        )

    def _park(self, error: Exception) -> Decision:
        """Keep the message in its slot for the wait, and then return the message to its queue, to run again (step 5)."""
        self.delivery.abandoned = True
        self.delivery.follow_ups = None
        self.transport.park(self.message, self.decision.delay_ms or wait_before_return(0))
        logger.error(
            "The broker refuses message %s of actor %r in every form (%s: %s). The message holds a slot of this worker for a "
            "while, and then runs again: make room in the queues.",
            self.message.message_id,
            self.message.actor_name,
            type(error).__name__,
            text_of(error),
        )
        return self.decision

    def _give_up(self, error: Exception) -> Decision:
        self.delivery.abandoned = True
        # Before the follow-up messages are dropped: the transport may remember them for a redelivery.
        self.transport.abandon(self.message)
        self.delivery.follow_ups = None
        return Decision(Outcome.INTERRUPTED, "handoff_failed", exception=error)

    def _mark_retry_pending(self) -> None:
        """Record in the claim that the run has ended, before the retry is published.

        A redelivery then publishes nothing but the retry, so the other messages are published first.
        """
        delivery, transport, follow_ups = self.delivery, self.transport, self.delivery.follow_ups
        if (
            delivery.claim is None
            or transport.acks_with_follow_ups
            or self.decision.outcome not in _REENQUEUED_OUTCOMES
            or not follow_ups
        ):
            return
        message_id = self.message.message_id
        again = next(
            (
                follow_up
                for follow_up in follow_ups
                if isinstance(follow_up, OutgoingMessage) and follow_up.message.message_id == message_id
            ),
            None,
        )
        if again is None:
            return
        if len(follow_ups) > 1:
            follow_ups.remove(again)
            try:
                transport.publish_follow_ups(self.message, delivery, None)
            finally:
                follow_ups.append(again)
        self.state.idempotency.claims.record_ending(delivery.claim, again)

    def _alert(self, text: str, error: Exception) -> None:
        message = self.message
        alerts.critical(
            text,
            message.message_id,
            message.actor_name,
            type(error).__name__,
            text_of(error),
            exc_info=error,
            extra={
                "actor": message.actor_name,
                "queue": self.transport.queue_name,
                "message_id": message.message_id,
                "reason": "handoff_failed",
            },
        )


def _resolve(delivery: Delivery) -> None:
    """Replace each call in the follow-ups by the messages that the call returns."""
    follow_ups = delivery.follow_ups
    if follow_ups is None:
        return
    for index, follow_up in enumerate(follow_ups):
        if not isinstance(follow_up, OutgoingMessage):
            # Replaced at once: after an error later, a second call would count a group's barrier again.
            follow_ups[index : index + 1] = follow_up()
            _resolve(delivery)
            return
