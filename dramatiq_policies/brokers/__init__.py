"""A package for each broker, with transport, batch, queue reader and browser; other brokers get the plain `Transport`."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, cast

from dramatiq.common import q_name

from .. import _dramatiq
from .._dramatiq import kind_of
from ..common.connections import close_when_interrupted
from ..common.forks import after_fork
from ..common.safe_logger import SafeLogger
from ..delivery.consumer import PolicyConsumer
from ..delivery.transport import Transport
from ..errors import ConfigurationError
from .batch import Batch

if TYPE_CHECKING:
    from dramatiq.broker import Broker, Consumer
    from dramatiq.brokers.redis import RedisBroker

    from ..delivery.broker_state import BrokerState

__all__ = ["batch", "batch_of", "browser", "prepare_broker", "queue_reader", "readers", "wrap_consumer"]

logger = SafeLogger("dramatiq_policies.outcomes")


def wrap_consumer(state: BrokerState, inner: Consumer, queue_name: str, prefetch: int = 1) -> PolicyConsumer:
    """Wrap a consumer that ``broker.consume`` returned."""
    return PolicyConsumer(_transport_of(state, inner, queue_name)(state, inner, queue_name, prefetch))


def _transport_of(state: BrokerState, inner: Consumer, queue_name: str) -> type[Transport]:
    # Check the kind of the consumer, too: a user's broker may wrap another broker and return the other broker's consumers.
    kind, is_delay_queue = kind_of(state.broker), queue_name != q_name(queue_name)
    if kind == "stub" and _dramatiq.is_stub_consumer(inner):
        from .stub.transport import StubTransport

        return StubTransport
    if kind == "redis" and _dramatiq.is_redis_consumer(inner):
        from .redis.delayed import RedisDelayTransport
        from .redis.transport import RedisTransport

        return RedisDelayTransport if is_delay_queue else RedisTransport
    if kind == "rabbitmq" and _dramatiq.is_rabbitmq_consumer(inner):
        from .rabbitmq.delayed import RabbitmqDelayTransport
        from .rabbitmq.transport import RabbitmqTransport

        return RabbitmqDelayTransport if is_delay_queue else RabbitmqTransport
    state.shared(_UnknownBroker, state.broker).log_once()
    return Transport


def batch_of(state: BrokerState) -> Batch:
    """Return what publishes on this broker."""
    kind = kind_of(state.broker)
    if kind == "stub":
        from .stub.batch import StubBatch

        return StubBatch(state)
    if kind == "redis":
        from .redis.batch import RedisBatch

        return RedisBatch(state)
    if kind == "rabbitmq":
        from .rabbitmq.batch import RabbitmqBatch

        return RabbitmqBatch(state)
    return Batch(state)


def prepare_broker(state: BrokerState) -> None:
    """Set up a broker once.

    On Redis, the broker gets the id of this process. On RabbitMQ, the broker opens new connections in a forked child. On
    StubBroker, an error for an argument that can't be encoded names the argument.

    Raises:
      ConfigurationError: The client decodes replies, so workers could read no message.
    """
    kind, broker = kind_of(state.broker), state.broker
    if kind == "stub":
        from .stub import transport as stub

        stub.explain_unserialisable(broker)
    elif kind == "redis":
        from .redis.worker_id import WorkerId

        _refuse_decoding(broker)
        state.shared(WorkerId, cast("RedisBroker", broker))
        # A send must use neither a connection broken by an interrupt nor a connection to a demoted server.
        close_when_interrupted(getattr(vars(broker).get("client"), "connection_pool", None))
    elif kind == "rabbitmq":
        state.shared(_Connections, broker)


class _UnknownBroker:
    """Logs once per process that the storage of a broker is unknown."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        #: Acquired by the first consumer, and never released.
        self._logged = threading.Lock()

    def log_once(self) -> None:
        if self._logged.acquire(blocking=False):
            logger.info(
                "%s is an unknown broker type: all rules work, but its dead letters carry no reason.",
                type(self.broker).__name__,
            )


class _Connections:
    """Makes a forked child forget the connections of the parent: writes of both processes would be interleaved."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        #: Kept alive, since freeing a connection closes the connection.
        self.of_parents: list[object] = []
        after_fork(self)

    def reset_after_fork(self) -> None:
        self.of_parents.append(_dramatiq.leave_rabbitmq_connections(self.broker))


def _refuse_decoding(broker: Broker) -> None:
    """Refuse a Redis client that decodes replies: the workers would move every message to the dead letters."""
    pool = getattr(vars(broker).get("client"), "connection_pool", None)
    settings = getattr(pool, "connection_kwargs", None) or {}
    if settings.get("decode_responses"):
        raise ConfigurationError.of_option(
            type(broker).__name__,
            "client",
            "a client that returns bytes",
            "a client with decode_responses=True",
            "Messages are bytes; with decode_responses workers can read no message. Leave "
            "decode_responses out, or use a separate client for the broker.",
        )
