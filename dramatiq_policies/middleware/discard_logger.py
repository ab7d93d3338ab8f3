"""One structured log record for each message that ends badly."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from ..logs import replace_worker_lines
from ..outcomes import Outcome, OutcomeEvent, text_of
from .base import PolicyMiddleware

if TYPE_CHECKING:
    from dramatiq.broker import MessageProxy

    from ..wiring import Wiring

__all__ = ["DiscardLogger"]

logger = logging.getLogger("dramatiq_policies.outcomes")


class DiscardLogger(PolicyMiddleware):
    """Logs each bad ending once, on ``dramatiq_policies.outcomes``, its fields in ``extra=``.

    Dead and expired messages are an ERROR with the stack, discarded and thrown ones a WARNING. While it is on, the
    worker's own lines on failed and skipped messages (with stack and arguments, also for errors that are retried) are
    left out. An alert has its own CRITICAL record.

    Parameters:
      level: One level for all of them, a number or a name. Default None, as above.
      log_args: Whether the message's arguments are logged, as ``job_args`` and ``job_kwargs``. Default False.

    Raises:
      ConfigurationError: If the level is none.
    """

    def __init__(self, level: int | str | None = None, log_args: bool = False) -> None:
        if isinstance(level, str):
            number = logging.getLevelName(level.upper())
            if not isinstance(number, int):
                raise ConfigurationError.of_option("DiscardLogger", "level", "a logging level", level)
            level = number
        if level is not None and (isinstance(level, bool) or not isinstance(level, int)):
            raise ConfigurationError.of_option("DiscardLogger", "level", "a logging level", level)
        self.level = level
        self.log_args = log_args

    def attach(self, wiring: Wiring) -> None:
        wiring.logs_failures = True
        wiring.observe(self, self._record, self, successes=False)
        replace_worker_lines()

    def _record(self, event: OutcomeEvent, message: MessageProxy | None) -> None:
        outcome = event.outcome
        if outcome not in (Outcome.DEAD, Outcome.EXPIRED, Outcome.DISCARDED):
            return
        mild = outcome is Outcome.DISCARDED or event.reason == "thrown"
        extra = event.extra()
        if self.log_args and message is not None:
            extra["job_args"], extra["job_kwargs"] = message.args, message.kwargs
        error = event.exception
        logger.log(
            self.level if self.level is not None else logging.WARNING if mild else logging.ERROR,
            "%s: message %s of actor %s, attempt %s%s%s",
            outcome.value if event.reason is None else f"{outcome.value} ({event.reason})",
            event.message_id,
            event.actor,
            event.attempt,
            "" if event.rule is None else f", by the rule for {event.rule}",
            "" if error is None else f": {type(error).__name__}: {text_of(error)}",
            extra=extra,
            exc_info=_stack(error) if not mild else None,
        )


def _stack(error: BaseException | None) -> Any:
    return None if error is None or error.__traceback__ is None else error
