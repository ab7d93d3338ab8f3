"""The end of a delivery: publish the follow-up messages, complete the key, store the failure, report the outcome, acknowledge.

The consumer calls `settle_and_ack` for each message after the run. If the process dies between any two lines, the broker
redelivers the unacknowledged message. Only an error of the publishing prevents the acknowledgement; errors of the later steps
are logged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common.safe_logger import SafeLogger
from ..errors import HandoffFailed
from ..outcomes import BAD_ENDINGS, Outcome, OutcomeEvent
from .decision import SUCCEEDED, Decision
from .delivery import Delivery
from .groups import warn_of_incomplete_group
from .history import attempt_of
from .publishing import FollowUpPublisher
from .results import store_failure

if TYPE_CHECKING:
    from dramatiq.broker import MessageProxy

    from .broker_state import BrokerState
    from .transport import Transport

__all__ = ["settle_and_ack"]

logger = SafeLogger("dramatiq_policies.outcomes")


def settle_and_ack(state: BrokerState, message: MessageProxy, delivery: Delivery) -> None:
    """Settle a delivery, once, and acknowledge the message. After an error, call this function again to continue.

    There is no acknowledgement here if the transport has acknowledged together with the publish (``acked``), or `FollowUpPublisher` has
    given up (``abandoned``): then the broker redelivers the message.
    """
    # The delivery's transport: after a reconnect the acknowledging consumer has another transport.
    transport: Transport = delivery.transport  # type: ignore[assignment]  # `DeliveringTransport` is a part of `Transport`.
    if not delivery.settled:
        if delivery.is_plain_success() and delivery.claim is None:
            # Nothing to publish, and no key to complete.
            delivery.settled = True
            if state.outcomes.success_listeners:
                state.outcomes.notify_success(delivery)
            if state.outcomes.successes_observed:
                _publish_outcome(state, message, delivery, SUCCEEDED)
        else:
            _settle(state, transport, message, delivery)
    if not (delivery.acked or delivery.abandoned):
        transport.ack(message)


def _settle(state: BrokerState, transport: Transport, message: MessageProxy, delivery: Delivery) -> None:
    """Publish the follow-up messages, complete or free the key, and report the outcome."""
    decision = delivery.decision
    if decision is None:
        delivery.decision = decision = undecided()
    succeeded = decision.outcome is Outcome.SUCCEEDED
    if not succeeded:
        delivery.restore_arguments(message)
    # A plain success has nothing to publish; but on Redis the publish may complete its key, in the same step as the acknowledgement.
    if not delivery.is_plain_success() or transport.completes_with_publish(delivery):
        delivery.decision = decision = FollowUpPublisher(state, transport, message, delivery, decision).run()
    if delivery.claim is not None:
        state.idempotency.claims.finish(delivery.claim, decision)
    delivery.settled = True
    if decision.outcome is Outcome.SUCCEEDED:
        state.outcomes.notify_success(delivery)
    elif decision.outcome is Outcome.INTERRUPTED:
        # The message will be redelivered: no hook (such as Dramatiq's Results) must take this failure for the end.
        message.failed = False
    elif decision.outcome in BAD_ENDINGS:
        _report_failure(state, message, delivery, decision, succeeded)
    if decision.outcome is not Outcome.SUCCEEDED or state.outcomes.successes_observed:
        _publish_outcome(state, message, delivery, decision)
    # The error's traceback refers to the message: break the cycle.
    delivery.decision = SUCCEEDED if decision is SUCCEEDED else None


def undecided() -> Decision:
    """Return the decision for a message without a decision: never a success."""
    error = HandoffFailed("the message was processed, but dramatiq_policies made no decision")
    return Decision(Outcome.DEAD, "handoff_failed", exception=error, dead_letter=True)


def _report_failure(
    state: BrokerState, message: MessageProxy, delivery: Delivery, decision: Decision, succeeded: bool
) -> None:
    """Store the failure as the job's result and call ``after_discard``.

    Parameters:
      succeeded: Whether the job succeeded, and only the publishing failed.
    """
    error = decision.exception
    assert error is not None  # A failure without an error of the job has an error of dramatiq_policies.
    store_failure(state, message, decision, error, succeeded)
    _after_discard(state, message, delivery, error)
    warn_of_incomplete_group(message, decision)


def _publish_outcome(state: BrokerState, message: MessageProxy, delivery: Delivery, decision: Decision) -> None:
    policy = delivery.policy or state.policies.get(message.actor_name)
    event = OutcomeEvent(
        outcome=decision.outcome,
        reason=decision.reason,
        actor=message.actor_name,
        queue=delivery.transport.queue_name,
        message_id=message.message_id,
        attempt=attempt_of(message.options) if decision.attempt is None else decision.attempt,
        wait_ms=delivery.waited_ms(),
        duration_ms=None if delivery.started is None else delivery.elapsed_ms(),
        delay_ms=decision.delay_ms,
        exception=decision.exception,
        rule=decision.rule,
        tags=None if policy is None else policy.tags,
    )
    state.outcomes.publish(event, message)


def _after_discard(state: BrokerState, message: MessageProxy, delivery: Delivery, error: BaseException) -> None:
    policy = delivery.policy or state.policies.get(message.actor_name)
    for hook in (None if policy is None else policy.after_discard, state.settings.after_discard):
        if hook is None:
            continue
        try:
            hook(message, error)
        except BaseException:  # Not even an exit: it would end the worker's thread before the ack.
            logger.exception("after_discard %r raised an error for message %s.", hook, message.message_id)
