"""All that comes before an ack, in this order: hand-off, results, ``after_discard``, the published outcome.

Called by the wrapping consumer for each message that a worker is done with. Between any two lines the process may die:
the message is not acked yet, so it comes back. The hand-off is the only step that can keep the ack from coming; the
later ones are best effort and logged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common.safe_logger import SafeLogger
from ..errors import HandoffFailed
from ..outcomes import BAD_ENDINGS, Outcome, OutcomeEvent
from .decision import SUCCEEDED, Decision
from .delivery import Delivery
from .history import attempt_of
from .publishing import Publication
from .results import settle_results

if TYPE_CHECKING:
    from dramatiq.broker import MessageProxy

    from .broker_state import BrokerState
    from .consumer import PolicyConsumer

__all__ = ["settle"]

logger = SafeLogger("dramatiq_policies.outcomes")


def settle(state: BrokerState, consumer: PolicyConsumer, message: MessageProxy, delivery: Delivery) -> bool:
    """Do all that must come before the ack, once.

    Returns:
      Whether the message is to be acked now: not if the hand-off has taken it off its queue already, and not if the
      hand-off was given up, for then the message must come back.
    """
    if not delivery.settled:
        decision = delivery.decision
        if decision is None:
            delivery.decision = decision = undecided()
        if decision.outcome is not Outcome.SUCCEEDED:
            delivery.restore(message)
        succeeded = decision.outcome is Outcome.SUCCEEDED
        delivery.decision = decision = Publication(state, consumer, message, delivery, decision).run()
        if delivery.claim is not None:
            delivery.claim.conclude(decision)
        delivery.settled = True
        if decision.outcome is Outcome.INTERRUPTED:
            # The message comes back: no hook is to take this failure for its end, as that of Dramatiq's Results does.
            message.failed = False
        _conclude(state, message, delivery, decision, succeeded)
        # The error's traceback leads to the message: no cycle is left behind.
        delivery.decision = SUCCEEDED if decision is SUCCEEDED else None
    return not (delivery.acked or delivery.abandoned)


def undecided() -> Decision:
    """For a message on which no hook of ours came to a decision: never a success."""
    error = HandoffFailed("the message was processed, but the bundle came to no decision on it")
    return Decision(Outcome.DEAD, "handoff_failed", exception=error, dead_letter=True)


def _conclude(
    state: BrokerState, message: MessageProxy, delivery: Delivery, decision: Decision, succeeded: bool
) -> None:
    """The best-effort steps, after the hand-off; ``succeeded`` says whether the job did, whatever came of the hand-off."""
    outcome = decision.outcome
    if outcome is Outcome.SUCCEEDED:
        state.notify_success(delivery)
        if not state.successes_observed:
            return
    policy = delivery.policy or state.policies.get(message.actor_name)
    if outcome in BAD_ENDINGS:
        error = decision.exception
        assert error is not None  # What ends badly without an error of the job's has one of ours.
        settle_results(state, message, decision, error, succeeded)
        _after_discard(state, message, delivery, error)
    event = OutcomeEvent(
        outcome=outcome,
        reason=decision.reason,
        actor=message.actor_name,
        queue=delivery.consumer.queue_name,
        message_id=message.message_id,
        attempt=attempt_of(message.options) if decision.attempt is None else decision.attempt,
        wait_ms=delivery.waited_ms(),
        duration_ms=None if delivery.started is None else delivery.elapsed_ms(),
        delay_ms=decision.delay_ms,
        exception=decision.exception,
        rule=decision.rule,
        tags=None if policy is None else policy.tags,
    )
    state.publish(event, message)


def _after_discard(state: BrokerState, message: MessageProxy, delivery: Delivery, error: BaseException) -> None:
    policy = delivery.policy or state.policies.get(message.actor_name)
    own = () if policy is None or policy.after_discard is None else (policy.after_discard,)
    for hook in (*own, *state.after_discard):
        try:
            hook(message, error)
        except BaseException:  # Not even an exit: it would end the worker's thread before the ack.
            logger.exception("after_discard %r failed for message %s.", hook, message.message_id)
