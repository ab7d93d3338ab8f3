"""The test kit's state of a StubBroker: its virtual clock and its patched ``enqueue``."""

from __future__ import annotations

from typing import Any

from dramatiq import Message
from dramatiq.broker import Broker
from dramatiq.brokers.stub import StubBroker

from ..delivery.broker_state import BrokerState
from ..errors import ConfigurationError
from ..idempotency.store_client import StoreDown
from ..middleware.base import has_policies
from ..middleware.idempotency import guard_on
from ..middleware.ordering import order_middleware
from ..transactions.outbox import outbox_on
from .outboxes import Unpublished
from .virtual_time import VirtualClock, clock_in_force

__all__ = ["StubEnvironment", "environment_of", "find_environment"]

_ATTRIBUTE = "dramatiq_policies_environment"


class StubEnvironment:
    """A StubBroker under test. Its messages get the virtual time."""

    def __init__(self, broker: StubBroker, state: BrokerState) -> None:
        self.broker = broker
        self.state = state
        self.clock = VirtualClock(self._renew_leases)
        self.draining = False
        self.outbox = outbox_on(state)
        #: Whether the idempotency store stays down: `drain` must not wait for the store.
        self.store_is_down = False
        #: Rows of the outbox that are committed and not published. Faults add to this list: change it in place.
        self.unpublished: list[Unpublished] = []
        stock, began = broker.enqueue, self.clock.now
        clock = self.clock

        def enqueue(message: Message[Any], *, delay: int | None = None) -> Message[Any]:
            if clock_in_force() is clock:
                return stock(message, delay=delay)
            with clock.in_force():
                if message.message_timestamp >= began:
                    # The message has the real time.
                    message = message.copy(message_timestamp=clock.now)
                return stock(message, delay=delay)

        broker.enqueue = enqueue  # type: ignore[method-assign]

    def _renew_leases(self) -> None:
        """Renew leases, as a worker's thread does in real time."""
        guard = guard_on(self.state)
        if guard is not None:
            try:
                guard.claims.leases.renew()
            except StoreDown:
                pass

    def delayed(self) -> list[Message[Any]]:
        """Return the messages on the delay queues."""
        return [
            Message.decode(body) for name in self.broker.delay_queues for body in tuple(self.broker.queues[name].queue)
        ]


def environment_of(broker: Broker) -> StubEnvironment:
    """Return the environment of the broker, made at the first call.

    Raises:
      ConfigurationError: The broker is not a StubBroker, or has no dramatiq_policies middleware.
    """
    environment: StubEnvironment | None = getattr(broker, "__dict__", {}).get(_ATTRIBUTE)
    if environment is None:
        if not isinstance(broker, StubBroker):
            raise ConfigurationError(
                f"The test kit runs the messages of a StubBroker, got a {type(broker).__name__}. Use `with "
                "stub() as broker:`: it lends the actors to a StubBroker."
            )
        if not has_policies(broker):
            raise ConfigurationError(
                "The broker has no middleware of dramatiq_policies, so its messages have no outcomes. "
                "Call install(broker) before you declare actors."
            )
        environment = vars(broker)[_ATTRIBUTE] = StubEnvironment(broker, order_middleware(broker))
    return environment


def find_environment(broker: Broker) -> StubEnvironment | None:
    """Return the environment of the broker, made at the first call; None for a broker that `drain` refuses."""
    return environment_of(broker) if isinstance(broker, StubBroker) and has_policies(broker) else None
