"""Find queues that hold messages on the server although no actor declares them any more."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from .._dramatiq import kind_of
from ..brokers.readers import browse
from .app import OperationError, known_queues, suggest

if TYPE_CHECKING:
    from dramatiq.broker import Broker

__all__ = ["find_any_queue", "undeclared_queues"]


def undeclared_queues(broker: Broker) -> list[str]:
    """Return the sorted names of undeclared queues with messages. AMQP can't list queues, so the list is empty on
    RabbitMQ."""
    kind = kind_of(broker)
    stub: Any = broker
    if kind == "redis":
        found = _in_redis(broker)
    elif kind == "stub":
        found = {*(name for name, dead_letters in stub.dead_letters_by_queue.items() if dead_letters), *stub.queues}
    else:
        return []
    return sorted({re.sub(r"\.(DQ|XQ)$", "", name) for name in found} - set(known_queues(broker)))


def _in_redis(broker: Any) -> set[str]:
    import redis

    from .._redis import scan
    from ..brokers.redis.browser import unreachable
    from ..brokers.redis.queue_reader import own_client

    client = own_client(broker.client)
    begins = f"{broker.namespace}:"
    try:
        names = [
            key.decode(errors="replace") if isinstance(key, bytes) else key for key in scan(client, begins, ".msgs")
        ]
    except redis.ResponseError:
        return set()  # The user may lack the right to scan.
    except (redis.RedisError, OSError) as error:
        raise unreachable(client, error) from None
    finally:
        client.connection_pool.disconnect()
    return {name.removeprefix(begins).removesuffix(".msgs") for name in names if not name.startswith(f"{begins}__")}


def find_any_queue(broker: Broker, queue: str) -> str:
    """Return the name of a queue that an actor declares or that holds messages on the server.

    Raises:
      OperationError: The queue does not exist; the text has the nearest names.
    """
    known = known_queues(broker)
    if queue in known:
        return queue
    strays = undeclared_queues(broker)
    if queue in strays:
        return queue
    if kind_of(broker) == "rabbitmq":
        for dead in (True, False):
            with browse(broker, queue, dead=dead) as browser:
                if len(browser):
                    return queue
    raise OperationError(
        f"No actor uses a queue {queue!r}, and the queue holds no messages{suggest(queue, [*known, *strays], 'the queues')}"
    )
