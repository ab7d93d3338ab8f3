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
from .delivery import SUCCEEDED, Delivery, Settlement
from .handing_off import HandOff
from .history import attempt_of
from .results import settle_results

if TYPE_CHECKING:
    from dramatiq.broker import MessageProxy

    from .broker_state import Wiring
    from .consumer import PolicyConsumer

__all__ = ["settle"]

logger = SafeLogger("dramatiq_policies.outcomes")


def settle(wiring: Wiring, consumer: PolicyConsumer, message: MessageProxy, delivery: Delivery) -> bool:
    """Do all that must come before the ack, once.

    Returns:
      Whether the message is to be acked now: not if the hand-off has taken it off its queue already, and not if the
      hand-off was given up, for then the message must come back.
    """
    if not delivery.settled:
        decided = delivery.settlement
        if decided is None:
            delivery.settlement = decided = undecided()
        if decided.outcome is not Outcome.SUCCEEDED:
            delivery.restore(message)
        succeeded = decided.outcome is Outcome.SUCCEEDED
        delivery.settlement = decided = HandOff(wiring, consumer, message, delivery, decided).run()
        if delivery.claim is not None:
            delivery.claim.conclude(decided)
        delivery.settled = True
        if decided.outcome is Outcome.INTERRUPTED:
            # The message comes back: no hook is to take this failure for its end, as that of Dramatiq's Results does.
            message.failed = False
        _conclude(wiring, message, delivery, decided, succeeded)
        # The error's traceback leads to the message: no cycle is left behind.
        delivery.settlement = SUCCEEDED if decided is SUCCEEDED else None
    return not (delivery.acked or delivery.abandoned)


def undecided() -> Settlement:
    """For a message on which no hook of ours came to a decision: never a success."""
    error = HandoffFailed("the message was processed, but the bundle came to no decision on it")
    return Settlement(Outcome.DEAD, "handoff_failed", exception=error, dead_letter=True)


def _conclude(wiring: Wiring, message: MessageProxy, delivery: Delivery, decided: Settlement, succeeded: bool) -> None:
    """The best-effort steps, after the hand-off; ``succeeded`` says whether the job did, whatever came of the hand-off."""
    outcome = decided.outcome
    if outcome is Outcome.SUCCEEDED:
        wiring.tell_success(delivery)
        if not wiring.successes_observed:
            return
    policy = delivery.policy or wiring.policies.get(message.actor_name)
    if outcome in BAD_ENDINGS:
        error = decided.exception
        assert error is not None  # What ends badly without an error of the job's has one of ours.
        settle_results(wiring, message, decided, error, succeeded)
        _after_discard(wiring, message, delivery, error)
    event = OutcomeEvent(
        outcome=outcome,
        reason=decided.reason,
        actor=message.actor_name,
        queue=delivery.consumer.queue_name,
        message_id=message.message_id,
        attempt=attempt_of(message.options) if decided.attempt is None else decided.attempt,
        wait_ms=delivery.waited_ms(),
        duration_ms=None if delivery.started is None else delivery.elapsed_ms(),
        delay_ms=decided.delay_ms,
        exception=decided.exception,
        rule=decided.rule,
        tags=None if policy is None else policy.tags,
    )
    wiring.publish(event, message)


def _after_discard(wiring: Wiring, message: MessageProxy, delivery: Delivery, error: BaseException) -> None:
    policy = delivery.policy or wiring.policies.get(message.actor_name)
    own = () if policy is None or policy.after_discard is None else (policy.after_discard,)
    for hook in (*own, *wiring.after_discard):
        try:
            hook(message, error)
        except BaseException:  # Not even an exit: it would end the worker's thread before the ack.
            logger.exception("after_discard %r failed for message %s.", hook, message.message_id)
