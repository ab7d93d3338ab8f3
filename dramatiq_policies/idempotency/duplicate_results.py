"""Move on the pipeline and the group of a duplicate, with the result of the first message."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dramatiq.middleware import GroupCallbacks, Middleware, Pipelines
from dramatiq.results import ResultFailure, ResultMissing, Results

from .. import _dramatiq
from ..common.middleware import find_middleware
from ..delivery.decision import Decision
from ..errors import NoResult
from ..outcomes import Outcome, logger

if TYPE_CHECKING:
    from dramatiq import Message
    from dramatiq.broker import Broker

    from ..delivery.delivery import Delivery

__all__ = ["ResultsDown", "forward_first_result"]


class ResultsDown(Exception):
    """The result backend can't be read now."""


def forward_first_result(broker: Broker, delivery: Delivery, first_message_id: str, *, may_come: bool = False) -> None:
    """Move on the pipeline and the group of a duplicate.

    Parameters:
      first_message_id: The id of the first message.
      may_come: Whether a missing result may still be stored.

    Raises:
      ResultMissing: The result is missing and may come.
      ResultsDown: The result backend is down.
      SkipMessage: The next step needs a missing result. The message is dead.
    """
    message = delivery.message
    options = message.options
    target = options.get("pipe_target")
    results = find_middleware(broker, Results)
    result, found, missed = None, False, False
    if results is not None:
        stored, ttl = _dramatiq.results_options(results, broker, message)
        if stored:
            origin = message.copy(message_id=first_message_id)
            try:
                result, found = results.backend.get_result(origin), True
                if first_message_id != message.message_id:
                    results.backend.store_result(message, result, ttl)
            except ResultMissing:
                if may_come:
                    raise
                missed = True
            except ResultFailure:
                pass
            except Exception as error:
                logger.warning(
                    "The result of message %s can't be read (%s). The duplicate %s of actor %s waits until the result backend "
                    "answers.",
                    first_message_id,
                    error,
                    message.message_id,
                    message.actor_name,
                )
                raise ResultsDown from error
    if target is not None and not found and not _ignores_result(broker, target, message.actor_name):
        missing = NoResult(
            f"the next step of the pipeline needs the result of message {first_message_id}, which is not stored"
        )
        delivery.skip(Decision(Outcome.DEAD, "no_result", exception=missing, dead_letter=True))
    if missed and results is not None:
        _store_missing_result(results, message, first_message_id, ttl)
    assert delivery.proxy is not None  # Inside the wrapper of the actor's function.
    continuing: list[Middleware] = [m for m in broker.middleware if isinstance(m, (Pipelines, GroupCallbacks))]
    for middleware in continuing:
        # Adds the follow-up messages of a success to the delivery.
        middleware.after_process_message(broker, delivery.proxy, result=result)


def _ignores_result(broker: Broker, target: dict[str, Any], actor_name: str) -> bool:
    actor = broker.actors.get(actor_name)
    return bool(
        target.get("options", {}).get("pipe_ignore") or (actor is not None and actor.options.get("pipe_ignore"))
    )


def _store_missing_result(results: Results, message: Message[Any], first_message_id: str, ttl: int) -> None:
    """Store an outcome for a skipped message without a result, so that nobody waits for the result forever."""
    try:
        if first_message_id == message.message_id:
            # No job ran. Plain Dramatiq stores None for a skipped message too.
            results.backend.store_result(message, None, ttl)
        else:
            error = NoResult(f"duplicate: the result of message {first_message_id} is not stored")
            results.backend.store_exception(message, error, ttl)
    except Exception:
        logger.warning(
            "No result could be stored for the duplicate %s of actor %s. Code that waits for the result gets none.",
            message.message_id,
            message.actor_name,
            exc_info=True,
        )
