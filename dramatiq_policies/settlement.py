"""All that comes before an ack, in this order: hand-off, results, ``after_discard``, the published outcome.

Called by the wrapping consumer for each message that a worker is done with. Between any two lines the process may die:
the message is not acked yet, so it comes back. The hand-off is the only step that can keep the ack from coming; the
later ones are best effort and logged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .delivery import Delivery, Settlement
from .errors import HandoffFailed
from .handing_off import HandOff
from .history import attempt_of
from .outcomes import BAD_ENDINGS, Outcome, OutcomeEvent, text_of
from .safe_logger import SafeLogger

if TYPE_CHECKING:
    from dramatiq.broker import MessageProxy

    from .consumer import PolicyConsumer
    from .wiring import Wiring

__all__ = ["settle"]

logger = SafeLogger("dramatiq_policies.outcomes")

#: Why a message is dead where no rule of ours had a say: the result's text is Dramatiq's own then.
_STOCK_REASONS = frozenset({"unclassified", "thrown"})


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
        delivery.settlement = decided = HandOff(wiring, consumer, message, delivery, decided).run()
        if delivery.claim is not None:
            delivery.claim.conclude(decided)
        delivery.settled = True
        _conclude(wiring, message, delivery, decided)
        # The error's traceback leads to the message: no cycle is left behind.
        delivery.settlement = None
    return not (delivery.acked or delivery.abandoned)


def undecided() -> Settlement:
    """For a message on which no hook of ours came to a decision: never a success."""
    error = HandoffFailed("the message was processed, but the bundle came to no decision on it")
    return Settlement(Outcome.DEAD, "handoff_failed", exception=error, dead_letter=True)


def _conclude(wiring: Wiring, message: MessageProxy, delivery: Delivery, decided: Settlement) -> None:
    """The best-effort steps, after the hand-off."""
    outcome = decided.outcome
    if outcome is Outcome.SUCCEEDED:
        wiring.tell_success(delivery)
        if not wiring.successes_observed:
            return
    policy = delivery.policy or wiring.policies.get(message.actor_name)
    if outcome in BAD_ENDINGS:
        error = decided.exception
        assert error is not None  # What ends badly without an error of the job's has one of ours.
        _settle_results(wiring, message, decided, error)
        _after_discard(wiring, message, delivery, error)
        if decided.exhausted:
            _tell_exhausted(wiring, message, delivery, decided)
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


def _settle_results(wiring: Wiring, message: MessageProxy, decided: Settlement, error: BaseException) -> None:
    """Store a failure that names the outcome, so that whoever waits for the result need not wait on.

    Dramatiq stores one for a nacked message only, and without the outcome; on the local copy ``store_results`` is
    switched off so that it does not overwrite ours.
    """
    from dramatiq.results import Results

    for middleware in wiring.broker.middleware:
        if not isinstance(middleware, Results):
            continue
        actor = wiring.broker.actors.get(message.actor_name)
        declared = {} if actor is None else actor.options
        options = message.options
        if options.get("store_results", declared.get("store_results", middleware.store_results)):
            ttl = options.get("result_ttl", declared.get("result_ttl", middleware.result_ttl))
            named = type(type(error).__name__, (Exception,), {})
            text = text_of(error) if decided.reason in _STOCK_REASONS else f"{decided.outcome.value}: {text_of(error)}"
            try:
                middleware.backend.store_exception(message, named(text), ttl)
            except Exception:
                logger.exception("The result of message %s could not be stored.", message.message_id)
                continue
            options["store_results"] = False


def _after_discard(wiring: Wiring, message: MessageProxy, delivery: Delivery, error: BaseException) -> None:
    policy = delivery.policy or wiring.policies.get(message.actor_name)
    own = () if policy is None or policy.after_discard is None else (policy.after_discard,)
    for hook in (*own, *wiring.after_discard):
        try:
            hook(message, error)
        except BaseException:  # Not even an exit: it would end the worker's thread before the ack.
            logger.exception("after_discard %r failed for message %s.", hook, message.message_id)


def _tell_exhausted(wiring: Wiring, message: MessageProxy, delivery: Delivery, decided: Settlement) -> None:
    """Send the ``on_retry_exhausted`` message, as stock does when its own retries are used up."""
    actor = wiring.broker.actors.get(message.actor_name)
    target = message.options.get("on_retry_exhausted") or (actor and actor.options.get("on_retry_exhausted"))
    if not target:
        return
    try:
        attempts = decided.attempt or 1
        wiring.broker.get_actor(target).send(message.asdict(), {"retries": attempts - 1, "max_retries": attempts - 1})
    except Exception:
        logger.exception("on_retry_exhausted %r could not be told of message %s.", target, message.message_id)
