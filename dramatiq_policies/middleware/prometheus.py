"""Make Dramatiq's Prometheus middleware count each retry once.

Plain Dramatiq counts enqueued messages with the option ``retries``. Dramatiq enqueues a delayed retry twice, on the delay queue
and then on the actor's queue, and so counts it twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..outcomes import Outcome

if TYPE_CHECKING:
    from dramatiq.broker import MessageProxy
    from dramatiq.middleware import Middleware

    from ..delivery.broker_state import BrokerState
    from ..outcomes import OutcomeEvent

__all__ = ["count_retries_of"]


def count_retries_of(middleware: Middleware, state: BrokerState) -> None:
    """Make a Prometheus middleware count each retry once; leave any other middleware alone."""
    # By the name of the module: an import would create a folder.
    if type(middleware).__module__ != "dramatiq.middleware.prometheus" or "after_enqueue" in vars(middleware):
        return

    def record(event: OutcomeEvent, message: MessageProxy | None) -> None:
        # The counter exists only in processes of the dramatiq command.
        counter = getattr(middleware, "total_retried_messages", None)
        if event.outcome is Outcome.RETRIED and counter is not None:
            counter.labels(event.queue, event.actor).inc()

    middleware.after_enqueue = lambda broker, message, delay: None  # type: ignore[method-assign]
    state.outcomes.observe(middleware, record, middleware, successes=False)
