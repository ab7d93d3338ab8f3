"""Call an idempotency store. Any error counts as an outage, and each outage is logged once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from ..common.forks import after_fork
from ..common.safe_logger import SafeLogger
from ..errors import MissingTable
from ..outcomes import text_of

__all__ = ["StoreClient", "StoreDown"]

alerts = SafeLogger("dramatiq_policies.alerts")

T = TypeVar("T")


class StoreDown(Exception):
    """The call of the store failed."""


class StoreClient:
    """Calls one store, and logs when an outage begins and ends."""

    def __init__(self) -> None:
        self._down = False
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        """Replace the lock: a thread of the parent process may have held the lock during the fork."""
        self._lock = threading.Lock()

    def call(self, function: Callable[[], T]) -> T:
        """Call the store. Log once when the store goes down, and once when the store is back.

        Raises:
          StoreDown: The call raised; the cause is its error.
        """
        try:
            answer = function()
        except Exception as error:
            with self._lock:
                first, self._down = not self._down, True
            if first and type(error).__name__ == "NoPermissionError":
                alerts.critical(
                    "The idempotency store permanently refuses this user: %s. Jobs with a key wait until "
                    "the user may access the keys and commands of the store: docs/brokers.md has an ACL "
                    "line.",
                    text_of(error),
                )
            elif first and isinstance(error, MissingTable):
                alerts.critical("%s Jobs with a key wait until then.", text_of(error))
            elif first:
                alerts.error(
                    "The idempotency store can't be reached (%s: %s). Until the store answers, jobs with a key wait, or run "
                    'unguarded with on_store_error="run".',
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
