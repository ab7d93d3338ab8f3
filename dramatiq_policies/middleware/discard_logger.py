"""Log one structured record per permanently failed message."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .._job_errors import exc_info_of
from ..common.safe_logger import SafeLogger
from ..common.throttle import Throttle
from ..errors import ConfigurationError
from ..observability.outcome_log import by_rule
from ..outcomes import Outcome, OutcomeEvent, extra_of, text_of
from .base import PolicyMiddleware

if TYPE_CHECKING:
    from dramatiq.broker import MessageProxy
    from typing_extensions import Self

    from ..delivery.broker_state import BrokerState

__all__ = ["DiscardLogger"]

logger = SafeLogger("dramatiq_policies.outcomes")


#: The records, and their default levels.
_LEVELS = {
    "dead": logging.ERROR,
    "expired": logging.ERROR,
    "discarded": logging.WARNING,
    "thrown": logging.WARNING,
}

Level = int | str


class DiscardLogger(PolicyMiddleware):
    """Log one record per dead, expired or discarded message, with the fields in ``extra=``.

    `install` adds one. To log discarded messages at INFO, pass your own::

        install(broker, discard_logger=DiscardLogger(level={"discarded": "info"}))

    The logger is ``dramatiq_policies.outcomes``. Dead and expired messages are an ERROR, discarded and thrown messages a
    WARNING. The first dead message of an actor and an exception class has its stack, from your code on; after that the stack
    is logged once per ``alert_interval`` of the `ErrorClassifier`. At DEBUG each record has the whole stack. An alert has a
    CRITICAL record of its own.

    With a DiscardLogger the worker leaves out Dramatiq's lines on failed and skipped messages, which show arguments and a stack
    at each retry. If no handler would write the record of a dead message, the worker keeps them.

    Parameters:
      level: One level for all records, as a number or a name. Or a mapping with levels for some of ``"dead"``,
        ``"expired"``, ``"discarded"`` and ``"thrown"`` (an error that Dramatiq's ``throws`` names). Default None: the levels
        above.
      log_args: Whether to log the message's arguments, in the text and as ``job_args`` and ``job_kwargs``. Default False.

    Raises:
      ConfigurationError: A level does not exist, the mapping has another key, or ``log_args`` is no bool.
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
        self._stacks = Throttle()
        self._state: BrokerState | None = None

    def attach(self, state: BrokerState) -> None:
        self._state = state
        state.failure_level = self.levels["dead"]
        state.outcomes.observe(self, self._record, self, successes=False)

    def _record(self, event: OutcomeEvent, message: MessageProxy | None) -> None:
        outcome = event.outcome
        if outcome not in (Outcome.DEAD, Outcome.EXPIRED, Outcome.DISCARDED):
            return
        record = "thrown" if event.reason == "thrown" else outcome.value
        extra = extra_of(event, message)
        called = ""
        if self.log_args and message is not None:
            extra["job_args"], extra["job_kwargs"] = message.args, message.kwargs
            called = f"; called with args={message.args!r} kwargs={message.kwargs!r}"
        error = event.exception
        logger.log(
            self.levels[record],
            "%s: message %s of actor %s, attempt %s%s%s%s",
            outcome.value if event.reason is None else f"{outcome.value} ({event.reason})",
            event.message_id,
            event.actor,
            event.attempt,
            by_rule(event),
            "" if error is None else f": {type(error).__name__}: {text_of(error)}",
            called,
            extra=extra,
            exc_info=self._stack_of(event, error) if error is not None and _LEVELS[record] == logging.ERROR else None,
        )

    def _stack_of(self, event: OutcomeEvent, error: BaseException) -> Any:
        if logger.isEnabledFor(logging.DEBUG):
            return exc_info_of(error, whole=True)
        interval = 0 if self._state is None else self._state.settings.alert_interval
        if self._stacks.admits((event.actor, event.outcome, type(error)), interval):
            return exc_info_of(error, whole=False)
        return None

    def for_stub(self) -> Self:
        stub = super().for_stub()
        vars(stub).update(_stacks=Throttle(), _state=None)
        return stub


def _number(level: Level) -> int:
    number: Any = logging.getLevelName(level.upper()) if isinstance(level, str) else level
    if isinstance(number, bool) or not isinstance(number, int):
        raise ConfigurationError.of_option("DiscardLogger", "level", "a logging level", level)
    return number
