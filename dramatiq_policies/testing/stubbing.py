"""`stub`: run an application's actors on a StubBroker, without a change of the application."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import dramatiq.broker
from dramatiq.broker import Broker
from dramatiq.brokers.stub import StubBroker
from dramatiq.common import q_name
from dramatiq.middleware import GroupCallbacks, Middleware
from dramatiq.rate_limits.backends.stub import StubBackend as StubLimits
from dramatiq.results import Results
from dramatiq.results.backends.stub import StubBackend as StubResults

from .. import _dramatiq
from ..bundle import install
from ..common.callables import unwrapped
from ..errors import ConfigurationError
from ..middleware.base import PolicyMiddleware, has_policies
from ..middleware.ordering import order_middleware
from .stub_environment import find_environment

if TYPE_CHECKING:
    from dramatiq import Actor

__all__ = ["stub"]

#: Methods of the application's broker that call the StubBroker.
_LENT = ("enqueue", "join", "flush", "flush_all", "get_results_backend")


@contextmanager
def stub(broker: Broker | None = None) -> Iterator[StubBroker]:
    """Lend a broker's actors to a fresh StubBroker, and return them at the end::

        with stub() as broker:
            send_confirmation.send(42, "ada@example.com")
            drain(broker).assert_outcomes(send_confirmation, "succeeded")

    The StubBroker has the same middleware with the same settings, but keeps all data in memory; nothing connects. Messages that
    the application sends through its own broker go to the StubBroker too.

    Parameters:
      broker: The broker to replace. Default None: the global broker; if none is set, the StubBroker gets `install`'s
        defaults.

    Your own middleware is the same object on both brokers. Rate limiters and result backends that your code has made
    stay as they are.

    Import the application before the block. An application first imported inside of the block keeps the global broker that the
    import sets, and does not lend its actors. If the import sets no broker, the actors are lent, and belong to the global broker
    afterwards; without a global broker the actors stay on the StubBroker.
    """
    if broker is not None and not isinstance(broker, Broker):
        raise ConfigurationError.of_option("stub()", "broker", "a broker, or None for the global broker", broker)
    real = dramatiq.broker.global_broker if broker is None else broker
    stand_in = _fresh(real)
    saved: list[tuple[Actor[..., Any], Broker, Any]] = []

    def lend(actor: Actor[..., Any]) -> None:
        saved.append((actor, actor.broker, actor.fn))
        actor.fn = unwrapped(actor.fn)
        actor.broker = stand_in
        stand_in.declare_actor(actor)

    restores = []
    try:
        if real is None or real is dramatiq.broker.global_broker:
            restores.append(_stand_in_globally(stand_in))
        if real is not None:
            restores.append(_redirect(real, stand_in, lend))
            for actor in list(real.actors.values()):
                lend(actor)
        # Before the first message, which gets the virtual time.
        find_environment(stand_in)
        yield stand_in
    finally:
        for actor, own, fn in reversed(saved):
            actor.broker, actor.fn = own, fn
        for restore in reversed(restores):
            restore()
        if real is not None:
            for actor in stand_in.actors.values():
                if actor.broker is stand_in and _is_of_a_module(actor):
                    actor.broker, actor.fn = real, unwrapped(actor.fn)
                    real.declare_actor(actor)


def _is_of_a_module(actor: Actor[..., Any]) -> bool:
    """Whether a module declares the actor; actors of a test function end with the test."""
    fn = unwrapped(actor.fn)
    return "<locals>" not in getattr(fn, "__qualname__", type(fn).__qualname__)


def _fresh(broker: Broker | None) -> StubBroker:
    if broker is None:
        return install(StubBroker())
    if has_policies(broker):
        order_middleware(broker)
    stand_in = StubBroker(middleware=[])
    stand_in.middleware = [
        _for_stub(middleware) for middleware in broker.middleware if _dramatiq.worker_behind(middleware) is None
    ]
    for middleware in stand_in.middleware:
        _dramatiq.add_options(stand_in, middleware)
    if has_policies(stand_in):
        order_middleware(stand_in)
    for name in sorted({q_name(name) for name in broker.get_declared_queues()}):
        stand_in.declare_queue(name)
    return stand_in


def _for_stub(middleware: Middleware) -> Middleware:
    if isinstance(middleware, PolicyMiddleware):
        return middleware.for_stub()
    if isinstance(middleware, Results):
        middleware = copy.copy(middleware)
        middleware.backend = StubResults(encoder=middleware.backend.encoder)
        middleware.backend.results = {}  # Dramatiq's class shares the dictionary among all instances.
    elif isinstance(middleware, GroupCallbacks):
        middleware = copy.copy(middleware)
        middleware.rate_limiter_backend = StubLimits()
    return middleware


def _stand_in_globally(stand_in: StubBroker) -> Any:
    before = dramatiq.broker.global_broker
    dramatiq.broker.global_broker = stand_in

    def restore() -> None:
        # An application imported meanwhile may have set its own broker.
        if dramatiq.broker.global_broker is stand_in:
            dramatiq.broker.global_broker = before

    return restore


def _redirect(real: Broker, stand_in: StubBroker, lend: Any) -> Any:
    """Redirect the messages of ``real`` to the StubBroker, and lend actors declared on ``real`` later."""

    def lent(name: str) -> Any:
        # Looked up at each call: a fault may have replaced the method.
        return lambda *args, **kwargs: getattr(stand_in, name)(*args, **kwargs)  # noqa: PLW0108

    declare = real.declare_actor

    def declare_actor(actor: Actor[..., Any]) -> None:
        declare(actor)
        lend(actor)

    names = {name: lent(name) for name in _LENT} | {"declare_actor": declare_actor}
    own = {name: vars(real)[name] for name in names if name in vars(real)}
    vars(real).update(names, dramatiq_policies_lent_to=stand_in)

    def restore() -> None:
        for name in (*names, "dramatiq_policies_lent_to"):
            del vars(real)[name]
        vars(real).update(own)

    return restore
