"""Order a broker's middleware, and attach dramatiq_policies to its actors and consumers."""

from __future__ import annotations

import functools
import threading
from time import monotonic
from typing import Any

from dramatiq import Actor
from dramatiq.broker import Broker, Consumer
from dramatiq.middleware import Callbacks as StockCallbacks
from dramatiq.middleware import GroupCallbacks as StockGroupCallbacks
from dramatiq.middleware import Middleware, Retries, TimeLimit
from dramatiq.middleware import Pipelines as StockPipelines
from dramatiq.middleware import ShutdownNotifications as StockShutdownNotifications
from dramatiq.results import Results as StockResults
from dramatiq.worker import ConsumerThread

from .. import _dramatiq
from ..brokers import prepare_broker, wrap_consumer
from ..common.credentials import learn_passwords
from ..common.safe_logger import make_safe
from ..delivery.actor_policy import ActorPolicy
from ..delivery.broker_state import BrokerState, state_of
from ..delivery.executor import wrap_actor
from ..delivery.limits import check_timeouts
from ..errors import ConfigurationError, how_to_add_once
from ..idempotency.options import resolve_idempotency
from .base import Installer, PolicyMiddleware, arrangement_of, register_installer
from .composition import Callbacks, GroupCallbacks, Pipelines, reliable_results
from .error_classifier import ErrorClassifier
from .prometheus import count_retries_of
from .shutdown import ShutdownNotifications
from .timeout import Timeout

__all__ = ["kind_of_ours", "order_middleware", "resolve_actor"]

#: The middleware after the ErrorClassifier, in this order; without hooks on messages. By name: unused middleware is not
#: imported.
_LISTENERS = ("Idempotency", "DiscardLogger", "Metrics", "SentryReporter", "QueueMonitor", "Heartbeat", "Outbox")

_lock = threading.RLock()


def order_middleware(broker: Broker) -> BrokerState:
    """Order the broker's middleware, and attach middleware and actors added since the last call.

    ErrorClassifier and Timeout take the places of ``Retries`` and ``TimeLimit``. The listeners follow the ErrorClassifier.
    Hooks iterate over the list during this call: this function replaces the list and never changes it.
    """
    state = state_of(broker)
    arrangement = arrangement_of(state)
    if arrangement.middleware is broker.middleware and arrangement.length == len(broker.middleware):
        if arrangement.actors != len(broker.actors):
            _resolve_actors(state)
        return state
    with _lock:
        ours: dict[str, PolicyMiddleware] = {}
        for middleware in broker.middleware:
            if isinstance(middleware, PolicyMiddleware):
                kind = kind_of_ours(middleware)
                if kind in ours and not ours[kind].auto_added:
                    raise ConfigurationError(f"The broker has two {kind} middleware. {how_to_add_once()}.")
                if kind in ours:
                    _replace_auto_added(state, ours[kind], middleware)
                ours[kind] = middleware
        if "ErrorClassifier" not in ours:
            # The others need the ErrorClassifier's hooks. Without rules it retries like Dramatiq's Retries.
            ours["ErrorClassifier"] = added = ErrorClassifier()
            added.auto_added = True
        broker.middleware = _ordered(broker.middleware, ours)
        for middleware in broker.middleware:
            count_retries_of(middleware, state)
            _dramatiq.add_options(broker, middleware)
            if isinstance(middleware, PolicyMiddleware) and middleware not in arrangement.attached:
                _attach(state, middleware)
            elif isinstance(middleware, ShutdownNotifications):
                state.shutdown_notifications = middleware
        if not arrangement.wraps_consume:
            prepare_broker(state)
            arrangement.wraps_consume = True
            _wrap_consume(state)
        learn_passwords(broker, *broker.middleware)
        arrangement.middleware = broker.middleware
        arrangement.length = len(broker.middleware)
        _resolve_actors(state)
    return state


def _replace_auto_added(state: BrokerState, added: Middleware, explicit: Middleware) -> None:
    """Replace an automatically added ErrorClassifier by the user's own."""
    assert isinstance(added, ErrorClassifier)
    assert isinstance(explicit, ErrorClassifier)
    explicit.inherit_settings(added)
    state.outcomes.forget(added)
    arrangement_of(state).attached.remove(added)
    state.policies.clear()


def kind_of_ours(middleware: PolicyMiddleware) -> str:
    """Return the name of a middleware's class, or of the base class from dramatiq_policies."""
    return next(cls.__name__ for cls in type(middleware).__mro__ if PolicyMiddleware in cls.__bases__)


def _attach(state: BrokerState, middleware: PolicyMiddleware) -> None:
    if middleware.attached_to not in (None, state):
        raise ConfigurationError(
            f"This {type(middleware).__name__} is on another broker already. Make a separate one for each broker."
        )
    middleware.attached_to = state
    arrangement_of(state).attached.append(middleware)
    middleware.attach(state)


def _ordered(present: list[Middleware], ours: dict[str, PolicyMiddleware]) -> list[Middleware]:
    classifier, timeout = ours["ErrorClassifier"], ours.get("Timeout")
    assert isinstance(classifier, ErrorClassifier)
    kinds = {type(middleware) for middleware in present}
    listeners = [ours[kind] for kind in _LISTENERS if kind in ours]
    ordered: list[Middleware] = []
    for middleware in present:
        if type(middleware) is Retries:
            classifier.inherit_settings(middleware)
            ordered += [classifier, *listeners]
        elif type(middleware) is TimeLimit and isinstance(timeout, Timeout):
            timeout.inherit_settings(middleware)
            ordered.append(timeout)
        elif middleware is classifier:
            ordered += [] if Retries in kinds else [classifier, *listeners]
        elif middleware is timeout:
            ordered += [] if TimeLimit in kinds else [timeout]
        elif not isinstance(middleware, PolicyMiddleware):
            ordered.append(_replace_stock(middleware))
    return ordered if classifier in ordered else [*ordered, classifier, *listeners]


def _replace_stock(middleware: Middleware) -> Middleware:
    """Return the safe replacement of a middleware of Dramatiq, with the same settings; other middleware unchanged."""
    if type(middleware) is StockPipelines:
        return Pipelines()
    if type(middleware) is StockCallbacks:
        return Callbacks()
    if type(middleware) is StockGroupCallbacks:
        return _with_its_settings(GroupCallbacks, middleware)
    if type(middleware) is StockResults:
        return reliable_results(middleware)
    if type(middleware) is StockShutdownNotifications:
        return ShutdownNotifications(middleware.notify_shutdown)
    return middleware


def _with_its_settings(kind: type[Middleware], stock: Middleware) -> Middleware:
    ours = kind.__new__(kind)
    vars(ours).update(vars(stock))
    return ours


def _resolve_actors(state: BrokerState) -> None:
    """Resolve the options of new actors, and wrap their functions."""
    broker = state.broker
    for actor in list(broker.actors.values()):
        resolve_actor(state, actor)
    arrangement_of(state).actors = len(broker.actors)


def resolve_actor(state: BrokerState, actor: Actor[..., Any]) -> None:
    """Resolve an actor's options, and wrap its function.

    Raises:
      ConfigurationError: An option is wrong.
    """
    known = state.policies.get(actor.actor_name)
    if (
        known is not None
        and known.options is actor.options
        and known.timeout is state.timeout
        and known.idempotency_defaults is state.idempotency.defaults
    ):
        return
    classifier = next(m for m in arrangement_of(state).attached if isinstance(m, ErrorClassifier))
    policy = ActorPolicy(actor, classifier.rules)
    policy.idempotency = resolve_idempotency(
        f"actor {actor.actor_name!r}", actor, policy.rules, state.idempotency.defaults
    )
    policy.idempotency_defaults = state.idempotency.defaults
    if policy.transactional:
        _add_transactional(state, actor, policy)
    if state.timeout is not None:
        check_timeouts(f"actor {actor.actor_name!r}", actor.options)
        policy.timeout_ms, policy.queue_timeout_ms = state.timeout.resolve(actor.options)
    policy.timeout = state.timeout
    state.policies[actor.actor_name] = policy
    wrap_actor(actor)


def _add_transactional(state: BrokerState, actor: Actor[..., Any], policy: ActorPolicy) -> None:
    where = f"actor {actor.actor_name!r}"
    if state.transactional_jobs is None:
        raise ConfigurationError(
            f"{where}: transactional=True needs an outbox in your database. Call install(broker, outbox=SqlOutbox(engine), "
            "idempotency=Idempotency(SqlStore(engine))), or with Django DjangoOutbox() and DjangoStore()."
        )
    state.transactional_jobs.add(where, actor, policy.idempotency)


def _wrap_consume(state: BrokerState) -> None:
    """Wrap the broker's consumers in ours."""
    stock = state.broker.consume

    @functools.wraps(stock)
    def consume(queue_name: str, *args: Any, **kwargs: Any) -> Consumer:
        if state.last_polled_at is not None:
            # Also while the broker is down: the worker calls this again and again.
            state.last_polled_at[queue_name] = monotonic()
        prefetch = kwargs.get("prefetch", args[0] if args else 1)
        consumer = wrap_consumer(state, stock(queue_name, *args, **kwargs), queue_name, prefetch)
        thread = threading.current_thread()
        if isinstance(thread, ConsumerThread):
            thread.delay_queue = consumer.transport.delayed
            make_safe(thread.logger)
        return consumer

    state.broker.consume = consume  # type: ignore[method-assign]


register_installer(Installer(order_middleware, resolve_actor))
