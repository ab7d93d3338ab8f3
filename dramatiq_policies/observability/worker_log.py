"""Replace log lines of the worker, and warn at boot about loggers without a handler."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from dramatiq.broker import MessageProxy

from .. import _dramatiq
from .._job_errors import quietly
from ..common.safe_logger import ALERTS, OUTCOMES, SafeLogger, clean_stack, is_heard, make_safe, write_to_stderr

if TYPE_CHECKING:
    from dramatiq.broker import Broker

    from ..delivery.broker_state import BrokerState

__all__ = ["make_stock_loggers_safe", "report_unheard", "stock_lines_logger"]

_REPLACED = frozenset({_dramatiq.FAILED_LINE, _dramatiq.EXPECTED_LINE, _dramatiq.SKIPPED_LINE})


class _ReplacedLines(logging.Filter):
    """Drops the worker's lines on failed and skipped messages, which dramatiq_policies logs itself.

    The worker logs an ERROR with stack and arguments before the decision to retry. The filter keeps the line if no handler writes
    the record of dramatiq_policies on a dead message.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        stays = self._stays(record)
        if stays:
            clean_stack(record)
        return stays

    def _stays(self, record: logging.LogRecord) -> bool:
        if record.msg not in _REPLACED or not isinstance(record.args, tuple) or not record.args:
            return True
        message = record.args[0]
        delivery = getattr(message, "delivery", None) if isinstance(message, MessageProxy) else None
        if delivery is None:
            return True
        level = delivery.transport.state.failure_level
        return level is None or not is_heard(OUTCOMES, level)


_filter = _ReplacedLines()


def filter_worker_lines() -> None:
    """Add the filter to the logger of the worker, once per process."""
    # Adding the same filter again does nothing.
    logging.getLogger(_dramatiq.WORKER_LOGGER).addFilter(_filter)


def make_stock_loggers_safe(broker: Broker) -> None:
    """Patch the loggers of Dramatiq's worker, broker, middleware and actors so that they never raise. Add the filter."""
    of_worker = [logging.getLogger(name) for name in (_dramatiq.WORKER_LOGGER, *_dramatiq.OTHER_LOGGERS)]
    filter_worker_lines()
    used = [_logger_of(one) for one in (broker, *broker.middleware, *broker.actors.values())]
    for logger in (*of_worker, *used):
        if isinstance(logger, logging.Logger):
            make_safe(logger)


def _logger_of(owner: object) -> object:
    # Not vars(): CPython before 3.13 then looks up each attribute and each hook of the object more slowly, for good.
    return quietly(lambda: getattr(owner, "logger", None))


def stock_lines_logger() -> logging.Logger:
    """Return the logger for the stock Retries: only errors, because our records replace the other lines."""
    logger = logging.getLogger("dramatiq_policies.stock")
    logger.setLevel(logging.ERROR)
    make_safe(logger)
    return logger


def report_unheard(state: BrokerState) -> None:
    """Warn about loggers of dramatiq_policies without a handler, through a logger with a handler, else on stderr.

    Called at worker boot, after the application has configured logging.
    """
    warns = any(getattr(middleware, "logs_alerts", False) for middleware in state.broker.middleware)
    needed = {ALERTS: logging.WARNING if warns else logging.CRITICAL}
    if state.failure_level is not None:
        needed[OUTCOMES] = state.failure_level
    unheard = [_why_unheard(name) for name, level in sorted(needed.items()) if not is_heard(name, level)]
    if not unheard:
        return
    text = (
        "Records on dead messages, alerts, stuck jobs or queues reach no handler: %s. Dramatiq's own "
        "log lines on failed jobs are kept."
    )
    for name in (ALERTS, _dramatiq.WORKER_LOGGER, ""):
        if is_heard(name, logging.WARNING):
            SafeLogger(name).warning(text, "; ".join(unheard))
            return
    write_to_stderr(ALERTS, logging.WARNING, text, ("; ".join(unheard),))


def _why_unheard(name: str) -> str:
    logger = logging.getLogger(name)
    if logger.disabled:
        return (
            f"the logger {name} is disabled: logging.config disables each existing logger. Set "
            '"disable_existing_loggers" to False, or name the logger in the configuration'
        )
    return (
        f"no handler writes the records of the logger {name}: lower its level, or add a handler to it or "
        "to the root logger"
    )
