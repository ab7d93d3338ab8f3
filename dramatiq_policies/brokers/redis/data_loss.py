"""Notice that Redis lost messages of this worker: somebody emptied Redis, or Redis evicted keys.

A settled message may be missing in Redis for three reasons: another worker took the message over, an earlier call settled the
message and the reply was lost, or Redis lost data. To detect lost data, every namespace has a random mark. Each process remembers the
mark, and reads the mark again only if a message is missing.
"""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import redis

from ..._redis import RAW, CommandBatcher
from ...common.forks import after_fork
from ...common.plurals import counted
from ...common.safe_logger import SafeLogger
from ...common.throttle import Throttle
from .prefetch import InFlight

if TYPE_CHECKING:
    from ...delivery.broker_state import BrokerState

__all__ = ["DataLoss"]

alerts = SafeLogger("dramatiq_policies.alerts")


class DataLoss:
    """Logs the messages of one broker that Redis no longer has, once per queue and ``alert_interval``, with their number.

    Parameters:
      state: The state of the broker.
      batcher: The command batcher of the broker.
    """

    def __init__(self, state: BrokerState, batcher: CommandBatcher) -> None:
        self._state = state
        self._batcher = batcher
        broker: Any = state.broker
        self._namespace = broker.namespace
        self._mark: bytes | None = None
        self._throttle = Throttle()
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        """Start without losses: the child holds no messages."""
        self._lock = threading.Lock()
        #: Messages taken before the loss, and already counted. Later messages are in Redis.
        self._lost: set[tuple[str, str]] = set()
        #: Lost messages that no line has counted yet, by queue.
        self._uncounted: Counter[str] = Counter()

    def remember(self) -> None:
        """Remember the mark of the namespace, and write a mark if there is none. Free after the first call."""
        if self._mark is None:
            # A user with few rights works without the mark: a loss stays unknown.
            with suppress(redis.exceptions.NoPermissionError):
                # Two consumers may do so at the same time: SET with NX makes both read the same mark.
                self._mark = self._read()

    def _read(self) -> bytes:
        name = f"{self._namespace}:__data__"
        client = self._batcher.client
        client.execute_command("SET", name, uuid4().hex, "NX", **RAW)
        found: bytes = client.execute_command("GET", name, **RAW) or b""
        return found

    def missing(self, queue: str, redis_id: str) -> None:
        """Find out why Redis does not know a message of this worker, and log a loss. Never raises."""
        with self._lock:
            try:
                self._look(queue, redis_id)
            except (redis.RedisError, OSError):
                pass  # A user with few rights, or a lost connection: the loss stays unknown.
            self._lost.discard((queue, redis_id))
            for name in list(self._uncounted):
                if self._throttle.admits(name, self._state.settings.alert_interval):
                    self._log(name, self._uncounted.pop(name))

    def _look(self, queue: str, redis_id: str) -> None:
        if self._mark is None:
            return
        mark = self._read()
        if mark != self._mark:
            for name, held in list(self._state.shared(InFlight).by_queue.items()):
                ids = {*held, redis_id} if name == queue else set(held)
                self._count(name, self._without_body(name, ids))
            self._mark = mark
        elif (queue, redis_id) not in self._lost and self._is_evicted(queue, redis_id):
            self._uncounted[queue] += 1

    def _count(self, queue: str, ids: set[str]) -> None:
        new = {(queue, redis_id) for redis_id in ids} - self._lost
        self._lost |= new
        if new:
            self._uncounted[queue] += len(new)

    @staticmethod
    def _log(queue: str, count: int) -> None:
        alerts.error(
            "Redis no longer has %s of queue %r that this worker took: Redis was emptied (FLUSHALL, a restart without "
            "persistence) or evicts keys. Jobs that began go on to their end; their retries and follow-up messages, and the "
            "messages that waited in Redis, may be lost: send them again. Set maxmemory-policy noeviction and appendonly yes.",
            counted(count, "message"),
            queue,
        )

    def _without_body(self, queue: str, ids: set[str]) -> set[str]:
        names = list(ids)
        bodies = f"{self._namespace}:{queue}.msgs"
        known = self._batcher.execute([("HEXISTS", bodies, name) for name in names])
        return {name for name, found in zip(names, known, strict=True) if not found}

    def _is_evicted(self, queue: str, redis_id: str) -> bool:
        """Whether Redis evicts keys, and has neither the body nor a sign that another worker took the message."""
        work = f"{self._namespace}:{queue}"
        evicted = self._batcher.client.info("stats").get("evicted_keys", 0)
        if not evicted:
            return False
        found = self._batcher.execute(
            [
                ("HEXISTS", f"{work}.msgs", redis_id),
                ("HEXISTS", f"{work.removesuffix('.DQ')}.XQ.msgs", redis_id),
                ("ZSCORE", f"{self._namespace}:__redelivered__.{queue}", redis_id),
            ]
        )
        return not any(found)
