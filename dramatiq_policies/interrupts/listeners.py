"""Callables that run in every thread after an interrupt of its job, such as one that closes connections."""

from __future__ import annotations

from collections.abc import Callable

from ..common.safe_logger import SafeLogger

__all__ = ["after_each_interrupt", "notify_interrupt"]

logger = SafeLogger("dramatiq_policies.outcomes")

_listeners: list[Callable[[], object]] = []


def after_each_interrupt(listener: Callable[[], object]) -> None:
    """Call ``listener`` after each interrupt in this process, for jobs of any broker.

    The job's thread (or greenlet) makes the call, once no other interrupt can come, also if the job has handled the interrupt.
    Async jobs are cancelled where they await: no call is made for them. An error of the listener is logged.
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
