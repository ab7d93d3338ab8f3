"""Listeners that run on a thread after an interrupt of a job, for example to close connections."""

from __future__ import annotations

from collections.abc import Callable

from ..common.safe_logger import SafeLogger

__all__ = ["after_each_interrupt", "notify_interrupt"]

logger = SafeLogger("dramatiq_policies.outcomes")

_listeners: list[Callable[[], object]] = []


def after_each_interrupt(listener: Callable[[], object]) -> None:
    """Call ``listener`` after each interrupt in this process, for jobs of any broker.

    The job's thread (or greenlet) calls the listener after the last possible interrupt, also if the job has handled the interrupt.
    Async jobs are cancelled at an ``await``, without a call. An error of the listener is logged.
    """
    if listener not in _listeners:
        _listeners.append(listener)


def notify_interrupt() -> None:
    """Call the listeners. Never raises."""
    for listener in _listeners:
        try:
            listener()
        except Exception:
            logger.exception("%r failed after the interrupt of a job; the message is not affected.", listener)
