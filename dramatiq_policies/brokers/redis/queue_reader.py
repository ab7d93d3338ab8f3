"""Read queues on Redis by their keys. Dramatiq's own commands would write a heartbeat."""

from __future__ import annotations

from typing import Any

import redis
from dramatiq.broker import Broker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.common import dq_name, xq_name
from dramatiq.errors import ConnectionClosed

from ...common.connections import close_when_interrupted
from ..queue_reader import ENDS, QueueReader, QueueReading, oldest

__all__ = ["RedisQueueReader", "own_client"]

#: Seconds to wait for Redis.
_TIMEOUT = 5


class RedisQueueReader(QueueReader):
    """Reads Dramatiq's keys over a separate connection.

    The age is the age of the oldest among the first and last 16 messages, by the clock of the sender. A stopping worker puts
    messages back at the end of the list. Between the two ends, their age is not seen.
    """

    broker: RedisBroker

    def __init__(self, broker: Broker) -> None:
        super().__init__(broker)
        self._client: Any = None

    def _read(self, queue: str, now: int) -> QueueReading:
        broker = self.broker
        key, later = f"{broker.namespace}:{queue}", f"{broker.namespace}:{dq_name(queue)}"
        if self._client is None:
            self._client = own_client(broker.client)
        try:
            with self._client.pipeline() as all_at_once:
                all_at_once.llen(key).hlen(f"{key}.msgs").hlen(f"{later}.msgs")
                all_at_once.zcard(f"{broker.namespace}:{xq_name(queue)}")
                all_at_once.lrange(key, 0, ENDS - 1).lrange(key, -ENDS, -1)
                ready, held, delayed, dead, first, last = all_at_once.execute()
            ids = list(dict.fromkeys((*first, *last)))
            bodies = self._client.hmget(f"{key}.msgs", ids) if ids else []
        except (redis.RedisError, OSError) as error:
            raise ConnectionClosed(error) from None
        return QueueReading(
            queue=queue,
            ready=ready,
            delayed=delayed,
            running=max(0, held - ready),
            dead=dead,
            oldest_ms=oldest(bodies, now),
            stalled_ms=self._stalled(queue, first[0] if first else None, now),
        )

    def close(self) -> None:
        if self._client is not None:
            self._client.connection_pool.disconnect()
        self._client = None


def own_client(client: Any) -> Any:
    """Return a client of the same server with a separate pool and timeouts. Disconnect the pool to close the client."""
    pool = client.connection_pool
    settings = {**pool.connection_kwargs, "socket_timeout": _TIMEOUT, "socket_connect_timeout": _TIMEOUT}
    if hasattr(pool, "service_name"):
        # A Sentinel pool looks up the master.
        settings.pop("connection_pool", None)
        own: Any = type(pool)(pool.service_name, pool.sentinel_manager, **settings)
    else:
        own = redis.ConnectionPool(connection_class=pool.connection_class, **settings)
    close_when_interrupted(own)
    return redis.Redis(connection_pool=own)
