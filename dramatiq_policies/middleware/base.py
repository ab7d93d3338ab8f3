"""The base class of all middleware of dramatiq_policies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from dramatiq.broker import Broker
from dramatiq.middleware import Middleware, MiddlewareError

from ..common.safe_logger import SafeLogger
from ..delivery.actor_options import ACTOR_OPTIONS
from ..errors import ConfigurationError

if TYPE_CHECKING:
    from dramatiq import Actor, Worker
    from typing_extensions import Self

    from ..delivery.broker_state import BrokerState

__all__ = [
    "Arrangement",
    "Installer",
    "PolicyMiddleware",
    "arrangement_of",
    "conflicting_stock",
    "has_policies",
    "order_middleware",
    "register_installer",
]

logger = SafeLogger("dramatiq_policies.alerts")


def conflicting_stock(broker: Broker, stock: type[Middleware], ours: type[Middleware]) -> list[str]:
    """Return the names of the broker's middleware derived from ``stock``, to be replaced by ``ours``."""
    found = (middleware for middleware in broker.middleware if isinstance(middleware, stock))
    return [type(middleware).__name__ for middleware in found if not isinstance(middleware, ours)]


def has_policies(broker: Broker) -> bool:
    """Return whether a broker has any middleware of dramatiq_policies."""
    return any(isinstance(middleware, PolicyMiddleware) for middleware in broker.middleware)


class Arrangement:
    """The middleware and the actors of a broker at the last call of `order_middleware`.

    Attributes:
      middleware, length: The broker's list of middleware, and its length.
      actors: The number of actors.
      attached: The attached middleware of dramatiq_policies.
      wraps_consume: Whether the consumers of the broker are ours.
    """

    def __init__(self) -> None:
        self.middleware: list[Middleware] | None = None
        self.length = 0
        self.actors = 0
        self.attached: list[PolicyMiddleware] = []
        self.wraps_consume = False


def arrangement_of(state: BrokerState) -> Arrangement:
    """Return the arrangement of a broker. Only `ordering` changes it."""
    return state.shared(Arrangement)


class Installer(NamedTuple):
    """The functions of `ordering`, which imports every middleware and so can't be imported here."""

    order_middleware: Callable[[Broker], BrokerState]
    resolve_actor: Callable[[BrokerState, Actor[..., Any]], None]


_installers: list[Installer] = []


def register_installer(installer: Installer) -> None:
    """Register the functions that the hooks of `PolicyMiddleware` call. `ordering` calls it once."""
    _installers[:] = [installer]


def order_middleware(broker: Broker) -> BrokerState:
    """Order the broker's middleware, and return its state; see `ordering`."""
    return _installers[0].order_middleware(broker)


class PolicyMiddleware(Middleware):
    """Base class of the middleware of dramatiq_policies.

    ``add_middleware`` calls no hook while the broker has no actors. So the middleware is attached at
    the first of these events: an actor is declared, a process or worker boots, a message is enqueued.
    """

    #: The state of the broker; None until the middleware is attached.
    attached_to: BrokerState | None = None
    #: Whether `ordering` added this middleware automatically.
    auto_added = False

    @property
    def actor_options(self) -> set[str]:
        # The options of ErrorClassifier, too: `ordering` adds one, but only after Dramatiq has refused unknown options.
        return {*super().actor_options, *ACTOR_OPTIONS}

    def attach(self, state: BrokerState) -> None:
        """Connect to the broker's state. Called once, after the middleware is in order."""

    #: The replaced middleware of Dramatiq, and its task in words.
    replaces: tuple[type[Middleware], str] | None = None

    def for_stub(self) -> Self:
        """Return a copy with the same settings for a StubBroker in a test: on no broker, without connections.

        `testing.stub` calls it. Extend it in a subclass with state or a connection.
        """
        stub = copy.copy(self)
        stub.attached_to = None
        return stub

    def before_declare_actor(self, broker: Broker, actor: Actor[..., Any]) -> None:
        try:
            _installers[0].resolve_actor(order_middleware(broker), actor)
        except MiddlewareError:
            raise
        except Exception as error:
            # Dramatiq only logs other errors of a hook, and would continue with an actor without rules.
            raise ConfigurationError(
                f"actor {actor.actor_name!r}: its options can't be read ({type(error).__name__}: {error})."
            ) from error

    def after_declare_actor(self, broker: Broker, actor: Actor[..., Any]) -> None:
        order_middleware(broker)

    def after_process_boot(self, broker: Broker) -> None:
        order_middleware(broker).in_command = True

    def before_worker_boot(self, broker: Broker, worker: Worker) -> None:
        order_middleware(broker)
        if self.replaces is not None:
            stock, what = self.replaces
            for name in conflicting_stock(broker, stock, type(self)):
                logger.warning(
                    "%s (a %s) conflicts with %s: both %s. Remove %s from the broker.",
                    name,
                    stock.__name__,
                    type(self).__name__,
                    what,
                    name,
                )
