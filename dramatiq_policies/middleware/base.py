"""What the middleware of the bundle have in common: they find their place at the first hook that knows the broker."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from dramatiq.broker import Broker
from dramatiq.middleware import Middleware, MiddlewareError

from ..common.safe_logger import SafeLogger
from ..errors import ConfigurationError

if TYPE_CHECKING:
    from dramatiq import Actor, Worker
    from typing_extensions import Self

    from ..delivery.broker_state import BrokerState

__all__ = ["PolicyMiddleware", "conflicting_stock"]

logger = SafeLogger("dramatiq_policies.alerts")


def conflicting_stock(broker: Broker, stock: type[Middleware], ours: type[Middleware]) -> list[str]:
    """The subclasses of a stock middleware, by name, that somebody has left beside the one of ours that replaces it."""
    found = (middleware for middleware in broker.middleware if isinstance(middleware, stock))
    return [type(middleware).__name__ for middleware in found if not isinstance(middleware, ours)]


class PolicyMiddleware(Middleware):
    """A middleware of the bundle.

    ``add_middleware`` tells it nothing of a broker that has no actors yet, so it takes its place when the first actor
    is declared, when a process or worker boots, or when a message is enqueued, whatever comes first.
    """

    @staticmethod
    def arrange(broker: Broker) -> BrokerState:
        """Bring the broker's middleware into the bundle's order; replaced by ``dramatiq_policies.bundle``."""
        raise NotImplementedError

    @staticmethod
    def resolve_actor(state: BrokerState, actor: Any) -> None:
        """Check and resolve one actor's options; replaced by ``dramatiq_policies.bundle``."""
        raise NotImplementedError

    #: The wiring of the broker that it is on, None until it has its place.
    attached_to: BrokerState | None = None
    #: Whether it was put on the broker only since another middleware of the bundle needs one.
    implied = False

    def attach(self, state: BrokerState) -> None:
        """Called once, when the middleware is in its place."""

    #: What Dramatiq's own does that this one takes the place of.
    replaces: tuple[type[Middleware], str] | None = None

    def for_stub(self) -> Self:
        """One with the same settings for a StubBroker in a test, on no broker yet and connected to nothing.

        `testing.stub` asks for it. A subclass with a state of its own, or a connection, extends it.
        """
        twin = copy.copy(self)
        twin.attached_to = None
        return twin

    def before_declare_actor(self, broker: Broker, actor: Actor[..., Any]) -> None:
        try:
            self.resolve_actor(self.arrange(broker), actor)
        except MiddlewareError:
            raise
        except Exception as error:
            # Dramatiq lets no other error out of a hook, and would go on with an actor that has no rules.
            raise ConfigurationError(
                f"actor {actor.actor_name!r}: its options can't be read ({type(error).__name__}: {error})."
            ) from error

    def after_declare_actor(self, broker: Broker, actor: Actor[..., Any]) -> None:
        self.arrange(broker)

    def after_process_boot(self, broker: Broker) -> None:
        self.arrange(broker).in_command = True

    def before_worker_boot(self, broker: Broker, worker: Worker) -> None:
        self.arrange(broker)
        if self.replaces is not None:
            stock, what = self.replaces
            for name in conflicting_stock(broker, stock, type(self)):
                logger.warning(
                    "%s is a %s, and %s too: both %s. Take it off the broker.",
                    name,
                    stock.__name__,
                    type(self).__name__,
                    what,
                )
