"""Store the failure of a job as its result, once."""

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

__all__ = ["store_failure"]

logger = SafeLogger("dramatiq_policies.outcomes")

#: Reasons known to plain Dramatiq: the result keeps Dramatiq's text.
_STOCK_REASONS = frozenset({"unclassified", "thrown"})


def store_failure(
    state: BrokerState, message: MessageProxy, decision: Decision, error: BaseException, succeeded: bool
) -> None:
    """Store a failure with the outcome's name as the job's result.

    Dramatiq stores a failure only for a nacked message, and without the outcome. ``store_results`` is set to False on the local
    copy of the message, so that Dramatiq does not overwrite the result. The result of a successful job stays: a client may
    have read the result.
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
                logger.exception(
                    "The result of message %s could not be stored. Code that waits for the result of actor %s gets none.",
                    message.message_id,
                    message.actor_name,
                )
                continue
            options["store_results"] = False


def _is_stored(results: Results, message: MessageProxy) -> bool:
    try:
        results.backend.get_result(message_of(message))
    except (ResultMissing, ResultFailure):
        return False
    return True
