"""Call Redis for a consumer, and classify the errors."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import redis
from dramatiq.errors import ConnectionClosed

from ...common.safe_logger import SafeLogger
from ...delivery.refusals import Unsendable

if TYPE_CHECKING:
    from ...delivery.broker_state import BrokerState

__all__ = ["RedisCalls"]

P = ParamSpec("P")
R = TypeVar("R")

alerts = SafeLogger("dramatiq_policies.alerts")

#: Permanent errors of Redis.
_PERMANENT = ("NOAUTH", "WRONGPASS", "NOPERM", "WRONGTYPE")
#: Temporary errors: Redis is full, cannot save, or has lost its replicas.
_FULL = ("used memory > 'maxmemory'", "MISCONF", "NOREPLICAS")
#: Seconds between two alerts about refused writes.
_ALERT_EVERY = 300.0
#: Errors about a value larger than ``proto-max-bulk-len``.
_TOO_LARGE = ("invalid bulk length", "string exceeds maximum allowed size")


class RedisCalls:
    """Calls Redis for the consumers of one broker, and translates errors for Dramatiq's worker."""

    def __init__(self, state: BrokerState) -> None:
        self._state = state
        self._alerted_full_at = -_ALERT_EVERY

    def __call__(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call Redis.

        Raises:
          redis.DataError: No connection can send the command.
          Unsendable: A value exceeds the limit of Redis.
          ConnectionClosed: Any other error. A permanent one also ends a process of Dramatiq's command.
        """
        try:
            return call(*args, **kwargs)
        except redis.DataError:
            raise
        except redis.RedisError as error:
            text = str(error)
            if any(part in text for part in _TOO_LARGE):
                raise Unsendable(f"{type(error).__name__}: {text}") from error
            if isinstance(error, redis.AuthenticationError) or text.startswith(_PERMANENT):
                self._end_process(error)
            is_full = any(part in text for part in _FULL)
            if is_full and monotonic() - self._alerted_full_at >= _ALERT_EVERY:
                self._alerted_full_at = monotonic()
                alerts.critical(
                    "Redis accepts no writes (%s). Finished jobs wait until Redis accepts "
                    "writes again; no message is lost.",
                    text,
                )
            raise ConnectionClosed(error) from None
        except OSError as error:
            raise ConnectionClosed(error) from None

    def _end_process(self, error: Exception) -> None:
        state = self._state
        if state.fatal is None:
            state.fatal = f"{type(error).__name__}: {error}"
            alerts.critical(
                "Redis permanently refuses this worker (%s). %s",
                state.fatal,
                "The worker process exits." if state.in_command else "Stop the worker and correct the cause.",
            )
            if state.in_command:
                os.kill(os.getpid(), signal.SIGTERM)
