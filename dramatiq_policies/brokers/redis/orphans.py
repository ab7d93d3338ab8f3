"""Requeue messages that Redis delivered to this process in a lost reply.

A loss may raise no error: if the client repeats the fetch by itself, the second reply holds other messages. The transport knows
every id in hand. Further ids in this process's set of unacknowledged messages are orphans.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

from ..._redis import RAW
from ...common.plurals import counted
from ...common.safe_logger import SafeLogger

if TYPE_CHECKING:
    from dramatiq.brokers.redis import RedisBroker

    from ...delivery.broker_state import BrokerState
    from .prefetch import PrefetchWindow

__all__ = ["Orphans"]

logger = SafeLogger("dramatiq_policies.outcomes")

#: Seconds between two searches.
_CHECK_EVERY = 5.0


class Orphans:
    """The orphans of one queue.

    Parameters:
      state: The state of the broker.
      broker: The broker.
      queue: The queue.
      window: Knows the messages in hand.
    """

    def __init__(self, state: BrokerState, broker: RedisBroker, queue: str, window: PrefetchWindow) -> None:
        self._state = state
        self._broker = broker
        self._queue = queue
        self._window = window
        #: The start value makes the first fetch search.
        self._last_check = -_CHECK_EVERY

    def are_due(self) -> bool:
        """Whether to search again."""
        return monotonic() - self._last_check > _CHECK_EVERY

    def requeue(self) -> None:
        """Search for orphans, and requeue them."""
        broker = self._broker
        unacked = f"{broker.namespace}:__acks__.{broker.broker_id}.{self._queue}"
        # Read before and after: a message acknowledged in between is no orphan.
        held = frozenset(self._window.held)
        names = broker.client.execute_command("SMEMBERS", unacked, **RAW)
        held |= self._window.held
        orphans = [name for name in names if name.decode(errors="replace") not in held]
        if orphans:
            log = logger.info if self._state.stopping.is_set() else logger.warning
            log(
                "Requeued %s of queue %r that Redis lists for this worker and no thread holds.",
                counted(len(orphans), "message"),
                self._queue,
            )
            broker.do_requeue(self._queue, *orphans)
        self._last_check = monotonic()
