"""Dramatiq's Prometheus middleware, except that it counts retries as they are decided.

Stock counts what is enqueued with the option ``retries``: a retry with a delay is enqueued twice, once on the delay queue
and once on its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..outcomes import Outcome

if TYPE_CHECKING:
    from dramatiq.middleware import Middleware

    from ..delivery.broker_state import BrokerState
    from ..outcomes import OutcomeEvent

__all__ = ["count_retries_of"]


def count_retries_of(middleware: Middleware, state: BrokerState) -> None:
    """Have a Prometheus middleware that is on the broker count each retry once; any other is left alone."""
    # Known by its module, since to import that is to make a folder.
    if type(middleware).__module__ != "dramatiq.middleware.prometheus" or "after_enqueue" in vars(middleware):
        return

    def record(event: OutcomeEvent, message: Any) -> None:
        # Made when a process of the command boots, and only then.
        counter = getattr(middleware, "total_retried_messages", None)
        if event.outcome is Outcome.RETRIED and counter is not None:
            counter.labels(event.queue, event.actor).inc()

    middleware.after_enqueue = lambda broker, message, delay: None  # type: ignore[method-assign]
    state.observe(middleware, record, middleware, successes=False)
