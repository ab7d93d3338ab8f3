"""Log lines for alerts, and for outcomes other than permanent failures."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from .._job_errors import exc_info_of, is_a
from ..common.durations import format_duration
from ..common.safe_logger import SafeLogger
from ..common.throttle import Throttle
from ..errors import Snooze
from ..outcomes import Outcome, OutcomeEvent, class_path, extra_of, text_of
from ..rules.parsing import readable_rule

if TYPE_CHECKING:
    from dramatiq.broker import MessageProxy

__all__ = ["OutcomeLog", "by_rule"]

logger = SafeLogger("dramatiq_policies.outcomes")
alerts = SafeLogger("dramatiq_policies.alerts")


class OutcomeLog:
    """Logs retried, requeued and skipped messages, and alerts.

    Parameters:
      alert_interval: Milliseconds. An alert of the same actor and exception is CRITICAL once per interval, else a warning.
    """

    def __init__(self, alert_interval: int) -> None:
        self._alert_interval = alert_interval
        self._alerts = Throttle()

    def record(self, event: OutcomeEvent, message: MessageProxy | None) -> None:
        """Log one line for a retried, requeued or skipped message, or an alert."""
        error = event.exception
        if event.outcome is Outcome.RETRIED and logger.isEnabledFor(logging.WARNING):
            assert error is not None  # The job's error.
            logger.warning(
                "retried: message %s of actor %s, attempt %s, again in %s%s: %s: %s",
                event.message_id,
                event.actor,
                event.attempt,
                format_duration(event.delay_ms),
                by_rule(event),
                type(error).__name__,
                text_of(error),
                extra={**extra_of(event, message), "delay_ms": event.delay_ms},
            )
            if logger.isEnabledFor(logging.DEBUG):
                logger.debug(
                    "The stack of message %s:", event.message_id, exc_info=error, extra=extra_of(event, message)
                )
        elif event.outcome is Outcome.ALERTED:
            assert error is not None  # As above.
            self._alert(event, error, message)
        elif event.outcome in (Outcome.INTERRUPTED, Outcome.DEFERRED, Outcome.DUPLICATE, Outcome.SKIPPED):
            logger.log(
                logging.WARNING if event.reason == "handoff_failed" else logging.INFO,
                "%s: message %s of actor %s%s%s%s",
                event.outcome.value,
                event.message_id,
                event.actor,
                "" if event.reason is None else f" ({event.reason})",
                "" if event.delay_ms is None else f", again in {format_duration(event.delay_ms)}",
                _snooze_reason(error),
                extra={**extra_of(event, message), "delay_ms": event.delay_ms},
            )

    def _alert(self, event: OutcomeEvent, error: BaseException, message: MessageProxy | None) -> None:
        first = self._alerts.admits((event.actor, type(error)), self._alert_interval)
        (alerts if first else logger).log(
            logging.CRITICAL if first else logging.WARNING,
            "alerted%s: message %s of actor %s, attempt %s: %s: %s",
            "" if first else " again",
            event.message_id,
            event.actor,
            event.attempt,
            class_path(type(error)),
            text_of(error),
            extra=extra_of(event, message),
            exc_info=exc_info_of(error, whole=alerts.isEnabledFor(logging.DEBUG)) if first else None,
        )


def by_rule(event: OutcomeEvent) -> str:
    """Return the part of a log line that names the rule."""
    if event.rule is None:
        return ""
    return ", unclassified" if event.rule == "unclassified" else f", by the rule for {readable_rule(event.rule)}"


def _snooze_reason(error: Any) -> str:
    """Return the part of a log line with the reason of a `Snooze`, if the job gave one."""
    given = is_a(error, Snooze) and error.args[1:] != ("",)
    return f": {text_of(error)}" if given else ""
