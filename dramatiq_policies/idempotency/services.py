"""Find services that share an idempotency store and use the same keys.

A key belongs to an actor, and an actor to a service. Two services with an actor of the same name must not share a namespace
of the store: jobs of the second service would be duplicates of the first. Without a namespace, the name of a register
contains the broker's virtual host or namespace and the actor's queue, to separate services. To detect all other collisions,
each worker records its actors and their queues at the start, and logs a warning if another service has recorded the same
keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from copy import copy
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

from .._dramatiq import kind_of, rabbitmq_parameters
from ..common.clock import now_ms
from ..common.durations import WEEK_MS
from ..common.safe_logger import SafeLogger
from ..stores import IdempotencyStore
from .keys import typed_name

if TYPE_CHECKING:
    from dramatiq.broker import Broker

__all__ = ["Neighbour", "neighbours", "record_service", "server_of", "service_scope_of"]

logger = SafeLogger("dramatiq_policies.outcomes")

#: The register in which workers record their service.
_SERVICES = typed_name(("#", "services"))
#: For how long after the last start of a worker, in milliseconds, a service counts as running.
_RECENTLY = WEEK_MS
_TRIES = 20
#: Seconds to wait for RabbitMQ's name.
_ANSWER_WITHIN = 2.0


class Neighbour(NamedTuple):
    """An actor with keys that another service uses too.

    Attributes:
      actor: The actor's name.
      other: The queue and the broker of the other service.
      seen: When a worker of the other service last started, ms since the epoch.
    """

    actor: str
    other: str
    seen: int

    def __str__(self) -> str:
        return (
            f"Two services use the idempotency keys of actor {self.actor!r}: another service runs the "
            f"actor from {self.other}. Each service skips jobs as duplicates of the other service. Give "
            "each service a namespace of its own: RedisStore(…, namespace=…), SqlStore(…, namespace=…). "
            "If you have moved the actor to another queue, ignore this warning for a week"
        )


def service_scope_of(broker: Broker, store: IdempotencyStore) -> str | None:
    """Return the part of a register's name that separates services; None if the store's namespace does."""
    kind = kind_of(broker)
    if kind == "stub" or getattr(store, "is_namespaced", True):
        return None
    return _within(broker)


def _within(broker: Any) -> str:
    """Name the part of the server that a broker uses."""
    kind = kind_of(broker)
    if kind == "redis":
        return f"redis {broker.namespace}"
    if kind == "rabbitmq":
        return f"rabbitmq {getattr(rabbitmq_parameters(broker)[0], 'virtual_host', '/')}"
    return type(broker).__name__


def server_of(broker: Any, store: object) -> str | None:
    """Name the server of a broker and the used part, the same for each client; None if the server does not answer."""
    try:
        kind = kind_of(broker)
        if kind == "rabbitmq":
            return f"{_within(broker)} of {_cluster_of(broker)}"
        if kind == "redis":
            beside = getattr(store, "is_beside", None)
            if beside is not None and beside(broker.client):
                return _within(broker)
            return f"{_within(broker)} of {_id_of(broker)}"
    except Exception as error:
        logger.debug("The name of the broker's server can't be read: %s", error)
    return None


def _cluster_of(broker: Any) -> str:
    import pika

    copies = [copy(one) for one in rabbitmq_parameters(broker)]
    for one in copies:
        one.socket_timeout = one.stack_timeout = _ANSWER_WITHIN
        one.connection_attempts = 1
    connection = pika.BlockingConnection(copies)
    try:
        # Pika has no public access to the server's properties.
        name = connection._impl.server_properties.get("cluster_name", "")  # noqa: SLF001
    finally:
        connection.close()
    return name.decode() if isinstance(name, bytes) else str(name)


def _id_of(broker: Any) -> str:
    # A Redis server's own id changes with each start.
    name = f"{broker.namespace}:dramatiq_policies:id"
    broker.client.set(name, uuid4().hex, nx=True)
    found = broker.client.get(name)
    return found.decode() if isinstance(found, bytes) else str(found)


def record_service(
    store: IdempotencyStore, server: str, scope: str | None, queues: Iterable[tuple[str, str]]
) -> list[Neighbour]:
    """Record the actors of a service, and return the services that have recorded the same keys.

    Parameters:
      store: The store of the keys.
      server: See `server_of`.
      scope: See `service_scope_of`.
      queues: The actors with keys, each with the name of the queue.
    """
    queues = list(queues)
    held: bytes | None = None
    for _ in range(_TRIES):
        known = _read(held)
        now = now_ms()
        found = list(_others(known, server, scope, queues, now))
        for actor, queue in queues:
            of_actor = known.setdefault(_key(scope, actor, queue), {})
            of_actor[_name(server, queue)] = now
        value = json.dumps({actor: _recent(seen, now) for actor, seen in known.items() if _recent(seen, now)})
        entry = store.swap(_SERVICES, held, value.encode(), 4 * WEEK_MS)
        if entry is None:
            return found
        held = entry.value
    return []


def neighbours(
    store: IdempotencyStore, server: str, scope: str | None, queues: Iterable[tuple[str, str]]
) -> list[Neighbour]:
    """Return the services that have recorded the same keys, and write nothing. Parameters as for `record_service`."""
    return list(_others(_read(store.get(_SERVICES).value), server, scope, queues, now_ms()))


def _others(
    known: dict[str, dict[str, int]], server: str, scope: str | None, queues: Iterable[tuple[str, str]], now: int
) -> Iterator[Neighbour]:
    for actor, queue in queues:
        for other, seen in _recent(known.get(_key(scope, actor, queue), {}), now).items():
            if other != _name(server, queue):
                yield Neighbour(actor, other, seen)


def _key(scope: str | None, actor: str, queue: str) -> str:
    return actor if scope is None else json.dumps([scope, queue, actor])


def _name(server: str, queue: str) -> str:
    return f"queue {queue!r} ({server})"


def _recent(seen: dict[str, int], now: int) -> dict[str, int]:
    latest = sorted(seen.items(), key=lambda item: item[1])[-10:]
    return {name: at for name, at in latest if now - at < _RECENTLY}


def _read(value: bytes | None) -> dict[str, dict[str, int]]:
    """Decode the register. Unexpected content is left out."""
    try:
        found = json.loads(value or b"{}")
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        actor: {name: at for name, at in seen.items() if type(at) is int}
        for actor, seen in found.items()
        if isinstance(seen, dict)
    }
