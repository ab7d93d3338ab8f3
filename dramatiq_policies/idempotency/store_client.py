"""Calls of an idempotency store: whatever goes wrong in one, the store is down, which is said once for each outage."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from ..common.forks import after_fork
from ..common.safe_logger import SafeLogger
from ..outcomes import text_of

__all__ = ["StoreClient", "StoreDown"]

alerts = SafeLogger("dramatiq_policies.alerts")

T = TypeVar("T")


class StoreDown(Exception):
    """The store could not be asked."""


class StoreClient:
    """The calls of one store in this process."""

    def __init__(self) -> None:
        self._down = False
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        """In a new process no other thread holds the lock, whatever it says."""
        self._lock = threading.Lock()

    def ask(self, call: Callable[[], T]) -> T:
        """Call the store; say once when it goes down, and once when it is back."""
        try:
            answer = call()
        except Exception as error:
            with self._lock:
                first, self._down = not self._down, True
            if first and type(error).__name__ == "NoPermissionError":
                alerts.critical(
                    "The idempotency store refuses this user for good: %s. Jobs with a key wait until the user may use the "
                    "store's keys and commands: docs/brokers.md has an ACL line.",
                    text_of(error),
                )
            elif first:
                alerts.error(
                    "The idempotency store can't be reached: %s: %s",
                    type(error).__name__,
                    text_of(error),
                    exc_info=error,
                )
            raise StoreDown(f"{type(error).__name__}: {text_of(error)}") from error
        if self._down:
            with self._lock:
                first, self._down = self._down, False
            if first:
                alerts.warning("The idempotency store is back.")
        return answer
