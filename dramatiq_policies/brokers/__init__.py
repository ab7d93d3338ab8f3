"""One folder for each broker: its transport, its queue reader, its browser. Other brokers get the plain `Transport`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dramatiq.common import q_name

from .. import _dramatiq
from .._dramatiq import kind_of
from ..common.connections import close_when_interrupted
from ..common.forks import after_fork
from ..common.safe_logger import SafeLogger
from ..delivery.consumer import PolicyConsumer
from ..delivery.transport import Transport
from ..errors import ConfigurationError

if TYPE_CHECKING:
    from dramatiq.broker import Broker

    from ..delivery.broker_state import BrokerState

__all__ = ["prepare", "wrap_consumer"]

logger = SafeLogger("dramatiq_policies.outcomes")


def wrap_consumer(state: BrokerState, inner: Any, queue_name: str, prefetch: int = 1) -> PolicyConsumer:
    """Wrap what ``broker.consume`` returned."""
    return PolicyConsumer(_transport_of(state, inner, queue_name)(state, inner, queue_name, prefetch))


def _transport_of(state: BrokerState, inner: Any, queue_name: str) -> type[Transport]:
    # The kind of the consumer counts, too: a broker of the user's may have another broker inside, and return its consumers.
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
    if state.warned_of_unknown_broker.acquire(blocking=False):
        logger.info(
            "How %s stores messages is not known: its dead letters carry no reason; all rules work.",
            type(state.broker).__name__,
        )
    return Transport


def prepare(state: BrokerState) -> None:
    """Set up a broker once.

    A broker on Redis gets the id of this process, and one on RabbitMQ connections of its own in a forked child. A broker for
    tests names an argument that can't be sent.

    Raises:
      ConfigurationError: Its workers could read nothing.
    """
    kind = kind_of(state.broker)
    if kind == "stub":
        from .stub import transport as stub

        stub.explain_unserialisable(state.broker)
    elif kind == "redis":
        from .redis.worker_id import WorkerId

        _refuse_decoding(state.broker)
        state.shared(WorkerId, state.broker)
        # What sends must not use a connection that was struck, or that leads to a demoted server.
        close_when_interrupted(getattr(vars(state.broker).get("client"), "connection_pool", None))
    elif kind == "rabbitmq":
        state.shared(_Connections, state.broker)


class _Connections:
    """Has a forked child leave the connections of its parent alone: what either writes would be in the middle of the other's."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        #: Kept, since a connection that is freed is closed.
        self.of_parents: list[object] = []
        after_fork(self)

    def reset_after_fork(self) -> None:
        self.of_parents.append(_dramatiq.leave_rabbitmq_connections(self.broker))


def _refuse_decoding(broker: Any) -> None:
    """Refuse a client of Redis that decodes answers: its workers would move each message to the dead letters."""
    pool = getattr(vars(broker).get("client"), "connection_pool", None)
    settings = getattr(pool, "connection_kwargs", None) or {}
    if settings.get("decode_responses"):
        raise ConfigurationError.of_option(
            type(broker).__name__,
            "client",
            "a client that answers with bytes",
            "one with decode_responses=True",
            "Messages are bytes: workers could read none. Leave decode_responses out, or give the broker a client of its own.",
        )
