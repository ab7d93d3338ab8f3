"""Check the servers: the part of the gate that connects."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from dramatiq.common import dq_name, xq_name

from ... import _dramatiq
from ..._dramatiq import kind_of
from ...common.durations import format_duration
from ...common.middleware import find_middleware
from ...common.plurals import counted
from ...delivery.broker_state import state_of
from ...errors import MissingTable
from ...idempotency.services import neighbours, server_of
from ...middleware.idempotency import Idempotency, keyed_queues
from ...transactions.outbox import outbox_on
from ..app import known_queues
from ..outbox import NoOutboxTable, ask_database
from ..unreachable import store_error
from .findings import CODES, Finding

if TYPE_CHECKING:
    from dramatiq.broker import Broker
    from dramatiq.brokers.rabbitmq import RabbitmqBroker
    from dramatiq.brokers.redis import RedisBroker

__all__ = ["check_live"]

Found = Iterator[tuple[str, str]]
#: The largest accepted difference of clocks, in ms.
_SKEW = 1_000
_DAY = 86_400_000
#: A relay publishes a message within the lease and this time, in ms, unless the broker is down.
_RELAYED_WITHIN = 60_000


def check_live(broker: Broker) -> tuple[tuple[Finding, ...], dict[str, Any]]:
    """Connect to a broker's server, and return the findings and the facts.

    Changes nothing and takes no message. The facts are ``server``, ``version`` and more; ``unknown`` lists the
    questions that the server refuses.

    Raises:
      OperationError: The server can't be reached.
    """
    facts: dict[str, Any] = {"server": None, "unknown": []}
    checks: list[Callable[[Any, dict[str, Any]], Found]] = [_outbox]
    kind = kind_of(broker)
    if kind == "redis":
        checks = [_redis, _store, _outbox]
    elif kind == "rabbitmq":
        checks = [_rabbitmq, _store, _outbox]
    else:
        facts["unknown"].append(f"a {type(broker).__name__} has no server to check")
    findings = [
        Finding(code=code, severity=CODES[code].severity, actor=None, message=text, fix=CODES[code].fix)
        for check in checks
        for code, text in check(broker, facts)
    ]
    return tuple(findings), facts


def _redis(broker: RedisBroker, facts: dict[str, Any]) -> Found:
    import redis

    from ...brokers.redis.browser import unreachable

    try:
        yield from _ask_redis(broker, facts)
    except (redis.RedisError, OSError) as error:
        raise unreachable(broker.client, error) from None


def _ask_redis(broker: RedisBroker, facts: dict[str, Any]) -> Found:
    client = broker.client
    # INFO by sections: some managed servers refuse the whole.
    server, memory, kept, role = (
        client.info(section) for section in ("server", "memory", "persistence", "replication")
    )
    policy = memory.get("maxmemory_policy")
    facts.update(
        server="Redis",
        version=server.get("redis_version"),
        maxmemory=memory.get("maxmemory"),
        maxmemory_policy=policy,
        appendonly=bool(kept.get("aof_enabled")),
        role=role.get("role"),
    )
    if role.get("role") not in (None, "master"):
        yield "DP109", f"The server is a {role['role']}"
    if policy not in (None, "noeviction"):
        yield "DP101", f"maxmemory-policy is {policy}, maxmemory {memory.get('maxmemory')}"
    snapshots = _snapshots(client, facts)
    if not facts["appendonly"]:
        if snapshots == "":
            yield "DP102", "appendonly is off, and there are no snapshots"
        else:
            yield "DP103", f"appendonly is off; snapshots: {snapshots or 'not known'}"
    yield from _skew(client, facts)
    facts["dead_message_ttl_ms"] = broker.dead_message_ttl
    if broker.dead_message_ttl < _DAY:
        yield "DP108", f"dead_message_ttl is {format_duration(broker.dead_message_ttl)}"


def _snapshots(client: Any, facts: dict[str, Any]) -> str | None:
    import redis

    try:
        snapshots: str | None = client.config_get("save").get("save")
    except redis.ResponseError:
        # CONFIG is forbidden on most managed servers.
        facts["unknown"].append("whether Redis makes snapshots (CONFIG GET is refused)")
        return None
    facts["snapshots"] = snapshots
    return snapshots


def _skew(client: Any, facts: dict[str, Any]) -> Found:
    before = time.time()
    seconds, micros = client.time()
    after = time.time()
    there = seconds + micros / 1_000_000
    # The server read its clock between our two readings.
    skew = round((there - after if there > after else min(0.0, there - before)) * 1_000)
    facts["clock_skew_ms"] = skew
    if abs(skew) > _SKEW:
        yield (
            "DP104",
            f"The server's clock is {format_duration(abs(skew))} {'ahead of' if skew > 0 else 'behind'} this machine's",
        )


def _store(broker: Broker, facts: dict[str, Any]) -> Found:
    idempotency = find_middleware(broker, Idempotency)
    state = state_of(broker)
    if idempotency is None or idempotency.store is None or idempotency.guard is None:
        return
    store, scope = idempotency.store, idempotency.guard.scope
    warnings, server = getattr(store, "warnings", None), server_of(broker, store)
    try:
        found = warnings() if callable(warnings) else []
        others = [] if server is None else neighbours(store, server, scope, keyed_queues(state))
    except MissingTable as error:
        yield "DP112", str(error).removesuffix(".")
        return
    except Exception as error:
        raise store_error(store, error) from None
    facts["store"] = type(store).__name__
    for text in found:
        yield "DP110", text.removesuffix(".")
    for other in others:
        yield "DP111", str(other)


def _outbox(broker: Broker, facts: dict[str, Any]) -> Found:
    outbox = outbox_on(state_of(broker))
    if outbox is None:
        return
    try:
        found = ask_database(outbox, outbox.rows.stats)
    except NoOutboxTable as error:
        yield "DP112", str(error).removesuffix(".")
        return
    facts["outbox"] = type(outbox).__name__
    facts["outbox_pending"], facts["outbox_oldest_ms"] = found.pending, found.oldest_ms
    if found.oldest_ms > outbox.lease + _RELAYED_WITHIN:
        messages = counted(found.pending, "message waits", "messages wait")
        yield "DP113", f"{messages} in the outbox, the oldest for {format_duration(found.oldest_ms)}"


def _rabbitmq(broker: RabbitmqBroker, facts: dict[str, Any]) -> Found:
    from ...brokers.rabbitmq.browser import connect

    with connect(broker) as connection:
        yield from _ask_rabbitmq(broker, connection, facts)


def _ask_rabbitmq(broker: RabbitmqBroker, connection: Any, facts: dict[str, Any]) -> Found:
    # Pika keeps the server's properties private.
    inner = connection._impl  # noqa: SLF001
    properties, tuned = inner.server_properties, inner.params.heartbeat
    facts.update(server="RabbitMQ", version=_text(properties.get("version")), heartbeat_s=tuned)
    if not tuned:
        yield "DP107", "Neither the client nor the server asks for heartbeats"
    facts["confirm_delivery"] = bool(broker.confirm_delivery)
    if not broker.confirm_delivery:
        yield "DP106", ("confirm_delivery is False: RabbitMQ may lose a message of the application unnoticed")
    for queue in known_queues(broker):
        for name, arguments in _declared(broker, queue):
            error = _mismatch(connection, name, arguments)
            if error:
                yield "DP105", f"{name}: {error}"
    ttl = _dead_message_ttl()
    facts["dead_message_ttl_ms"] = ttl
    if ttl < _DAY:
        yield "DP108", f"The dead-letter queues' x-message-ttl is {format_duration(ttl)}"
    facts["unknown"] += ["consumer_timeout (not readable over AMQP; pass --consumer-timeout)", "the server's clock"]


def _declared(broker: RabbitmqBroker, queue: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return the queues that Dramatiq declares for a queue, with their arguments."""
    arguments = _dramatiq.rabbitmq_queue_arguments(broker, queue)
    yield queue, arguments
    yield dq_name(queue), arguments
    yield xq_name(queue), {"x-message-ttl": _dead_message_ttl()}


def _dead_message_ttl() -> int:
    from dramatiq.brokers.rabbitmq import DEAD_MESSAGE_TTL

    return int(DEAD_MESSAGE_TTL)


def _mismatch(connection: Any, name: str, arguments: dict[str, Any]) -> str | None:
    """Return the server's complaint about a declaration; None if it agrees or the queue does not exist."""
    import pika.exceptions

    # Passive first: a plain declaration would create a missing queue. Each on its own channel: an error closes the
    # channel.
    for options in ({"passive": True}, {"durable": True, "arguments": arguments}):
        channel = connection.channel()
        try:
            channel.queue_declare(name, **options)
        except pika.exceptions.ChannelClosedByBroker as error:
            if error.reply_code == 404:
                return None
            if error.reply_code == 406:
                return str(error.reply_text).removeprefix("PRECONDITION_FAILED - ")
            raise
        channel.close()
    return None


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else value
