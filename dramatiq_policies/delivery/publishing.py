"""Publish the follow-up messages and the dead letter of a delivery, until the broker has accepted all of them.

Each try fails in one of three ways (see `Fault`). After a lost connection the worker tries again until the broker is back, and
accepts the messages. Other refusals escalate, after five seconds or at once if the refusal is permanent:

1. Drop the follow-up messages (a retry, a next step). The message becomes a dead letter, reason ``handoff_failed``.
2. After a permanent refusal, make the dead letter small: no traceback, no history.
3. After another, publish the body as received for a dead letter. This needs no encoding.
4. Enqueue the message again with its failure, after a growing wait. The job does not run: the next worker continues here.
   The message takes no slot meanwhile.
5. If the broker refuses even that, keep the message in its slot for the wait, and then return the message to its queue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..common import clock
from ..common.clock import now_ms
from ..common.safe_logger import SafeLogger
from ..errors import HandoffFailed
from ..outcomes import Outcome, text_of
from .dead_letter import dead_letter_of, failure_to_keep
from .decision import Decision
from .delivery import Delivery, DeliveryReassigned
from .history import FAILURE, POLICIES, History, attempt_of
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
        #: Whether step 2 has begun.
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
                self._publish_all()
                return self.decision
            except Exception as error:
                if isinstance(error, DeliveryReassigned) or self._is_redelivered():
                    return self._give_up(error)
                if self._must_escalate(error):
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
                elif not self._pause(error):
                    return self._give_up(error)

    def _publish_all(self) -> None:
        transport, delivery = self.transport, self.delivery
        if self.decision.dead_letter and self.dead is None:
            self.dead = dead_letter_of(self.message, delivery, self._failure(), small=self.small)
        if delivery.follow_ups or self.dead is not None or transport.completes_with_publish(delivery):
            _call_follow_ups(delivery)
            self._record_ending()
            transport.publish_follow_ups(self.message, delivery, self.dead)
        if self.dead is not None:
            transport.dead_letters_accepted()

    def _pause(self, error: Exception) -> bool:
        """Wait before the next try. Returns False if the worker stops: the message is left to another worker."""
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
        is_stopping = self.state.stopping.wait(pause)
        return not is_stopping or self.tries == 1

    def _is_redelivered(self) -> bool:
        """Whether the broker has returned this message to its queue already."""
        return self.transport.will_redeliver() and not self.delivery.completes_key()

    def _must_escalate(self, error: Exception) -> bool:
        """Whether to escalate, and not to repeat the same try. Notes the time of the first refusal."""
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
            self._drop_follow_ups(error)  # Step 1.
        elif permanent and not self.small and not isinstance(self.dead, bytes):
            self.small, self.dead = True, None  # Step 2.
        elif permanent and delivery.body is not None and not isinstance(self.dead, bytes):
            self.dead = delivery.body  # Step 3.
        else:
            self._return(error)  # Step 4.

    def _drop_follow_ups(self, error: Exception) -> None:
        """Drop the follow-up messages; the message becomes a dead letter (step 1)."""
        self._alert(
            "The broker refused the follow-up messages of message %s of actor %r (%s: %s); the "
            "message goes to the dead-letter queue.",
            error,
        )
        self.delivery.follow_ups = None
        if not self.decision.dead_letter:
            self.decision = self.delivery.decision = self._handoff_failed(error)
            self.message.fail()
        self.dead = None

    def _is_dead_letter_at_fault(self, permanent: bool) -> bool:
        """Whether the dead letter, and no follow-up message, can never be sent."""
        encoded = all(
            isinstance(follow_up, OutgoingMessage) and follow_up.encoded is not None
            for follow_up in self.delivery.follow_ups or ()
        )
        # On other brokers the dead letter is published after the follow-up messages.
        return permanent and encoded and self.transport.acks_with_follow_ups and not isinstance(self.dead, bytes)

    def _handoff_failed(self, error: Exception) -> Decision:
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

    def _failure(self) -> dict[str, Any]:
        policy = self.state.policies.get(self.message.actor_name)
        return failure_to_keep(self.message, self.decision, None if policy is None else policy.tags, small=self.small)

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
        again = self.delivery.next_message(**{FAILURE: self._failure(), RETURNED: times + 1})
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

    def _record_ending(self) -> None:
        """Record in the claim that the run has ended, before the message of the next run is published.

        A redelivery then publishes only that message, so the other follow-up messages are published first.
        """
        delivery, transport = self.delivery, self.transport
        if (
            delivery.claim is None
            or transport.acks_with_follow_ups
            or self.decision.outcome not in _REENQUEUED_OUTCOMES
            or not delivery.follow_ups
        ):
            return
        outgoing, message_id = delivery.outgoing, self.message.message_id
        next_run = next((one for one in outgoing if one.message.message_id == message_id), None)
        if next_run is None:
            return
        if len(outgoing) > 1:
            outgoing.remove(next_run)
            try:
                transport.publish_follow_ups(self.message, delivery, None)
            finally:
                outgoing.append(next_run)
        self.state.idempotency.claims.record_ending(delivery.claim, next_run)

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


def _call_follow_ups(delivery: Delivery) -> None:
    """Replace each call among the follow-up messages by the messages that the call returns."""
    follow_ups, index = delivery.follow_ups or [], 0
    while index < len(follow_ups):
        follow_up = follow_ups[index]
        if isinstance(follow_up, OutgoingMessage):
            index += 1
        else:
            # Replaced at once: after an error later, a second call would count a group's barrier again.
            follow_ups[index : index + 1] = follow_up()
