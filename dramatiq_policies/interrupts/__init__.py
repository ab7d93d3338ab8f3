"""Run a function, and end it at its deadline or at shutdown: on threads, as a coroutine, in greenlets."""

from __future__ import annotations

from .dispatch import Runner, runner_for, shutdown
from .slots import supported
from .threads import unwrap_interrupt

__all__ = [
    "Runner",
    "coroutines",
    "listeners",
    "runner_for",
    "shutdown",
    "slots",
    "supported",
    "threads",
    "unwrap_interrupt",
]
