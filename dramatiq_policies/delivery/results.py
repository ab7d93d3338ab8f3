"""What whoever waits for a job's result is told of a bad ending: once, and finally."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dramatiq.results import ResultFailure, ResultMissing, Results

from .._dramatiq import message_of
from ..common.safe_logger import SafeLogger
from ..outcomes import text_of
from .decision import Decision

if TYPE_CHECKING:
    from dramatiq.broker import MessageProxy

    from .broker_state import BrokerState

__all__ = ["settle_results"]

logger = SafeLogger("dramatiq_policies.outcomes")

#: Why a message is dead where no rule of ours had a say: the result's text is Dramatiq's own then.
_STOCK_REASONS = frozenset({"unclassified", "thrown"})


def settle_results(
    state: BrokerState, message: MessageProxy, decision: Decision, error: BaseException, succeeded: bool
) -> None:
    """Store a failure that names the outcome, so that whoever waits for the result need not wait on.

    Dramatiq stores one for a nacked message only, and without the outcome; on the local copy ``store_results`` is
    switched off so that it does not overwrite ours. The result of a job that succeeded stays, for it may have been seen.
    """
    for middleware in state.broker.middleware:
        if not isinstance(middleware, Results):
            continue
        actor = state.broker.actors.get(message.actor_name)
        declared = {} if actor is None else actor.options
        options = message.options
        if options.get("store_results", declared.get("store_results", middleware.store_results)):
            ttl = options.get("result_ttl", declared.get("result_ttl", middleware.result_ttl))
            named = type(type(error).__name__, (Exception,), {})
            text = (
                text_of(error) if decision.reason in _STOCK_REASONS else f"{decision.outcome.value}: {text_of(error)}"
            )
            try:
                if not (succeeded and _is_stored(middleware, message)):
                    middleware.backend.store_exception(message, named(text), ttl)
            except Exception:
                logger.exception("The result of message %s could not be stored.", message.message_id)
                continue
            options["store_results"] = False


def _is_stored(results: Results, message: MessageProxy) -> bool:
    try:
        results.backend.get_result(message_of(message))
    except (ResultMissing, ResultFailure):
        return False
    return True
