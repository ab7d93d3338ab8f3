"""Patches of Sentry's SDK, and all private names of the SDK used by dramatiq_policies.

Tested with sentry-sdk 2.0, 2.25 and 2.75. If a new release of the SDK breaks dramatiq_policies, the break is here.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from .. import _dramatiq
from ..outcomes import Outcome

if TYPE_CHECKING:
    from dramatiq.broker import Broker, MessageProxy

__all__ = ["drop_our_lines", "forget_last_seen", "job_scope", "quieten"]

#: Outcomes that are no failed transaction.
_NO_FAILURES: Final = frozenset({Outcome.DEFERRED, Outcome.INTERRUPTED})
_OUR_LOGGERS: Final = frozenset({"dramatiq_policies.outcomes", "dramatiq_policies.alerts"})


def job_scope(scope_class: Any) -> Any:
    """Return a lazy class for the isolation scope of a job: the outer scope is forked at first use.

    A fork copies a dozen containers, which costs a sixth of Dramatiq's whole work for a message. Most jobs never use the scope. An
    instance starts without slots; the first missing slot triggers the fork.
    """

    class JobScope(scope_class):  # type: ignore[misc]
        __slots__ = ("around",)

        def __getattr__(self, name: str) -> Any:
            if name not in scope_class.__slots__:
                raise AttributeError(name)
            fork = self.around.fork()
            fork.clear_breadcrumbs()
            for slot in scope_class.__slots__:
                # Keep the slots set by the job. Some versions leave a slot unset in a copy.
                if not _is_set(self, slot) and _is_set(fork, slot):
                    setattr(self, slot, getattr(fork, slot))
            return object.__getattribute__(self, name)

    return JobScope


def _is_set(scope: object, slot: str) -> bool:
    try:
        object.__getattribute__(scope, slot)
    except AttributeError:
        return False
    return True


def quieten(middleware: Any) -> None:
    """Stop Sentry's own Dramatiq middleware from reporting our jobs. Its transactions still show failures.

    Other middleware is not changed.
    """
    if type(middleware).__module__ != "sentry_sdk.integrations.dramatiq":
        return
    if "after_process_message" in vars(middleware):
        return
    stock = middleware.after_process_message

    def after_process_message(
        broker: Broker, message: MessageProxy, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        delivery = getattr(message, "delivery", None)
        if delivery is None:
            stock(broker, message, result=result, exception=exception)
            return
        decision = delivery.decision
        span = getattr(message, "_sentry_span_ctx", None)
        if exception is not None and span is not None and (decision is None or decision.outcome not in _NO_FAILURES):
            if hasattr(span, "set_status"):
                span.set_status("internal_error")
            else:
                span.status = "error"
        stock(broker, message, result=result, exception=None)

    middleware.after_process_message = after_process_message


def forget_last_seen(client: Any) -> None:
    """Make Sentry report an error even if a log line has already sent the same error."""
    from sentry_sdk.integrations.dedupe import DedupeIntegration

    last_seen = getattr(client.get_integration(DedupeIntegration), "_last_seen", None)
    if last_seen is not None:
        last_seen.set(None)


def drop_our_lines() -> None:
    """Stop Sentry from making events of our log lines."""
    from sentry_sdk.scope import add_global_event_processor, global_event_processors

    if _without_our_lines not in global_event_processors:
        add_global_event_processor(_without_our_lines)


def _without_our_lines(event: Any, hint: Any) -> Any:
    """Drop the event of a log line if Sentry has a report already."""
    record = hint.get("log_record") if hint else None
    if not isinstance(record, logging.LogRecord):
        return event
    if record.name in _OUR_LOGGERS:
        # Records of a delivery or of a stuck job.
        already_reported = hasattr(record, "reason") or hasattr(record, "stack")
    else:
        already_reported = record.msg == _dramatiq.UNKNOWN_ACTOR_LINE
    return None if already_reported else event
