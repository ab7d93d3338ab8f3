"""One structured log record for each message that ends badly."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..common.safe_logger import SafeLogger
from ..errors import ConfigurationError
from ..outcomes import Outcome, OutcomeEvent, extra_of, text_of
from .base import PolicyMiddleware

if TYPE_CHECKING:
    from dramatiq.broker import MessageProxy

    from ..delivery.broker_state import BrokerState

__all__ = ["DiscardLogger"]

logger = SafeLogger("dramatiq_policies.outcomes")


#: What is logged, and at which level unless another is given.
_LEVELS = {
    "dead": logging.ERROR,
    "expired": logging.ERROR,
    "discarded": logging.WARNING,
    "thrown": logging.WARNING,
}

Level = int | str


class DiscardLogger(PolicyMiddleware):
    """Logs each bad ending once, on ``dramatiq_policies.outcomes``, its fields in ``extra=``.

    Dead and expired messages are an ERROR with the stack, discarded and thrown ones a WARNING. While it is on, the
    worker's own lines on failed and skipped messages (with stack and arguments, also for errors that are retried) are
    left out, unless no handler would write the record of a dead message. An alert has its own CRITICAL record.

    Parameters:
      level: One level for all of them, a number or a name; or a mapping that gives some of ``"dead"``, ``"expired"``,
        ``"discarded"`` and ``"thrown"`` (an error that stock's ``throws`` names) a level of their own. Default None, as
        above.
      log_args: Whether the message's arguments are logged, in the text and as ``job_args`` and ``job_kwargs``. Default
        False.

    Raises:
      ConfigurationError: If a level is none, the mapping names something else, or ``log_args`` is no bool.
    """

    def __init__(self, level: Level | Mapping[str, Level] | None = None, log_args: bool = False) -> None:
        self.levels = dict(_LEVELS)
        if isinstance(level, Mapping):
            for name, own in level.items():
                if name not in _LEVELS:
                    raise ConfigurationError.of_option("DiscardLogger", "level", f"some of {', '.join(_LEVELS)}", name)
                self.levels[str(name)] = _number(own)
        elif level is not None:
            self.levels = dict.fromkeys(_LEVELS, _number(level))
        if not isinstance(log_args, bool):
            raise ConfigurationError.of_option("DiscardLogger", "log_args", "True or False", log_args)
        self.log_args = log_args

    def attach(self, state: BrokerState) -> None:
        state.failure_level = self.levels["dead"]
        state.observe(self, self._record, self, successes=False)

    def _record(self, event: OutcomeEvent, message: MessageProxy | None) -> None:
        outcome = event.outcome
        if outcome not in (Outcome.DEAD, Outcome.EXPIRED, Outcome.DISCARDED):
            return
        what = "thrown" if event.reason == "thrown" else outcome.value
        extra = extra_of(event, message)
        called = ""
        if self.log_args and message is not None:
            extra["job_args"], extra["job_kwargs"] = message.args, message.kwargs
            called = f"; called with args={message.args!r} kwargs={message.kwargs!r}"
        error = event.exception
        logger.log(
            self.levels[what],
            "%s: message %s of actor %s, attempt %s%s%s%s",
            outcome.value if event.reason is None else f"{outcome.value} ({event.reason})",
            event.message_id,
            event.actor,
            event.attempt,
            "" if event.rule is None else f", by the rule for {event.rule}",
            "" if error is None else f": {type(error).__name__}: {text_of(error)}",
            called,
            extra=extra,
            exc_info=error if _LEVELS[what] == logging.ERROR else None,
        )


def _number(level: Level) -> int:
    number: Any = logging.getLevelName(level.upper()) if isinstance(level, str) else level
    if isinstance(number, bool) or not isinstance(number, int):
        raise ConfigurationError.of_option("DiscardLogger", "level", "a logging level", level)
    return number
