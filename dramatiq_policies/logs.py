"""The log lines that the bundle writes in place of the worker's."""

from __future__ import annotations

import logging

from dramatiq.broker import MessageProxy

from . import _dramatiq

__all__ = ["replace_worker_lines"]

_REPLACED = frozenset({_dramatiq.FAILED_LINE, _dramatiq.EXPECTED_LINE, _dramatiq.SKIPPED_LINE})


class _ReplacedLines(logging.Filter):
    """Drops the worker's lines on failed and skipped messages, where the bundle writes a record of its own.

    The worker logs an ERROR with stack and arguments before any hook can say that the error is retried.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if record.msg not in _REPLACED or not isinstance(record.args, tuple) or not record.args:
            return True
        message = record.args[0]
        delivery = getattr(message, "delivery", None) if isinstance(message, MessageProxy) else None
        return delivery is None or not delivery.consumer.wiring.logs_failures


_filter = _ReplacedLines()


def replace_worker_lines() -> None:
    """Put the filter on the worker's logger, once per process."""
    # A logger keeps a filter only once.
    logging.getLogger(_dramatiq.WORKER_LOGGER).addFilter(_filter)
