"""Putting the bundle on a broker: `install`, and the one rule of its order."""

from __future__ import annotations

import functools
import threading
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from dramatiq.broker import Broker, Consumer
from dramatiq.middleware import Callbacks as StockCallbacks
from dramatiq.middleware import GroupCallbacks as StockGroupCallbacks
from dramatiq.middleware import Middleware, Retries, TimeLimit
from dramatiq.middleware import Pipelines as StockPipelines
from dramatiq.middleware import ShutdownNotifications as StockShutdownNotifications
from dramatiq.results import Results as StockResults
from dramatiq.worker import ConsumerThread

from . import _dramatiq
from .brokers import prepare, wrap_consumer
from .common.credentials import learn_passwords
from .common.safe_logger import make_safe
from .delivery.actor_policy import ActorPolicy
from .delivery.broker_state import BrokerState, state_of
from .delivery.executor import wrap_actor
from .delivery.limits import validate
from .errors import ConfigurationError
from .idempotency.options import resolve_guard
from .middleware.base import PolicyMiddleware
from .middleware.composition import Callbacks, GroupCallbacks, Pipelines, storing
from .middleware.discard_logger import DiscardLogger
from .middleware.error_classifier import ErrorClassifier
from .middleware.idempotency import Idempotency
from .middleware.prometheus import count_retries_of
from .middleware.shutdown import ShutdownNotifications
from .middleware.timeout import Timeout

if TYPE_CHECKING:
    from .middleware.heartbeat import Heartbeat
    from .middleware.metrics import Metrics
    from .middleware.queue_monitor import QueueMonitor
    from .middleware.sentry import SentryReporter

__all__ = ["arrange", "install"]

B = TypeVar("B", bound=Broker)

#: Those that stand behind the ErrorClassifier, in this order: their hooks on messages do nothing. By name, since what
#: nobody put on the broker is not imported.
_LISTENERS = ("Idempotency", "DiscardLogger", "Metrics", "SentryReporter", "QueueMonitor", "Heartbeat")


def install(
    broker: B,
    *,
    error_classifier: ErrorClassifier | None = None,
    timeout: Timeout | None = None,
    idempotency: Idempotency | Literal[False] | None = None,
    discard_logger: DiscardLogger | Literal[False] | None = None,
    metrics: Metrics | None = None,
    sentry: SentryReporter | None = None,
    queue_monitor: QueueMonitor | None = None,
    heartbeat: Heartbeat | None = None,
) -> B:
    """Put the bundle on a broker, and return the broker.

    Parameters:
      broker: Any broker; before its actors are declared, for their options are unknown before.
      error_classifier: None means one with its defaults, which keeps the settings of the stock ``Retries``.
      timeout: None means one with its defaults, which keeps the limit of the stock ``TimeLimit``.
      idempotency: None means one with its defaults where it finds a store (on a RedisBroker or a StubBroker), and none
        elsewhere; False none.
      discard_logger: None means one with its defaults, False none.
      metrics: None means none.
      sentry: None means none.
      queue_monitor: None means none.
      heartbeat: None means none.

    Raises:
      ConfigurationError: If the bundle is on this broker already, or an argument is of the wrong kind.
    """
    given = [
        _checked("error_classifier", error_classifier, ErrorClassifier),
        _checked("timeout", timeout, Timeout),
        _idempotency(broker, idempotency),
        None if discard_logger is False else _checked("discard_logger", discard_logger, DiscardLogger),
        None if metrics is None else _expected("metrics", metrics, "Metrics"),
        None if sentry is None else _expected("sentry", sentry, "SentryReporter"),
        None if queue_monitor is None else _expected("queue_monitor", queue_monitor, "QueueMonitor"),
        None if heartbeat is None else _expected("heartbeat", heartbeat, "Heartbeat"),
    ]
    for middleware in broker.middleware:
        if isinstance(middleware, PolicyMiddleware):
            raise ConfigurationError(
                f"install(): the broker has a {type(middleware).__name__} already. "
                "Install the bundle once, or add each of its middleware yourself."
            )
    broker.middleware = [*broker.middleware, *(middleware for middleware in given if middleware is not None)]
    arrange(broker)
    return broker


def _idempotency(broker: Broker, given: Idempotency | Literal[False] | None) -> PolicyMiddleware | None:
    if given is False or (given is None and not Idempotency.has_default_store(broker)):
        return None
    return _checked("idempotency", given, Idempotency)


def _checked(name: str, value: Any, kind: type[PolicyMiddleware]) -> PolicyMiddleware:
    return kind() if value is None else _expected(name, value, kind.__name__)


def _expected(name: str, value: Any, kind: str) -> PolicyMiddleware:
    if not isinstance(value, PolicyMiddleware) or _kind(value) != kind:
        raise ConfigurationError.of_option("install()", name, f"a {kind} or None", value, secret=True)
    return value


_lock = threading.RLock()


def arrange(broker: Broker) -> BrokerState:
    """Bring the broker's middleware into order, and wire up what is new since the last time.

    ErrorClassifier and Timeout stand where ``Retries`` and ``TimeLimit`` stood; those that only listen, behind the
    ErrorClassifier. Hooks are iterating over the list while this is called: it is replaced, never changed.
    """
    state = state_of(broker)
    if state.arranged is broker.middleware and state.arranged_length == len(broker.middleware):
        if state.arranged_actors != len(broker.actors):
            _resolve_actors(state)
        return state
    with _lock:
        ours: dict[str, PolicyMiddleware] = {}
        for middleware in broker.middleware:
            if isinstance(middleware, PolicyMiddleware):
                kind = _kind(middleware)
                if kind in ours and not ours[kind].implied:
                    raise ConfigurationError(
                        f"The broker has two {kind} middleware. Add each once, or call install() once."
                    )
                if kind in ours:
                    _replace_implied(state, ours[kind], middleware)
                ours[kind] = middleware
        if "ErrorClassifier" not in ours:
            # The others stand on its seams; with no rules it does what the stock Retries did.
            ours["ErrorClassifier"] = implied = ErrorClassifier()
            implied.implied = True
        broker.middleware = _ordered(broker.middleware, ours)
        for middleware in broker.middleware:
            count_retries_of(middleware, state)
            _dramatiq.add_options(broker, middleware)
            if isinstance(middleware, PolicyMiddleware) and middleware not in state.attached:
                _attach(state, middleware)
            elif isinstance(middleware, ShutdownNotifications):
                state.shutdown_notifications = middleware
        if not state.attached_to_consume:
            prepare(state)
            state.attached_to_consume = True
            _wrap_consume(state)
        learn_passwords(broker, *broker.middleware)
        state.arranged = broker.middleware
        state.arranged_length = len(broker.middleware)
        _resolve_actors(state)
    return state


def _replace_implied(state: BrokerState, implied: Middleware, explicit: Middleware) -> None:
    """An ErrorClassifier that was only put there for another middleware makes room for the user's own."""
    assert isinstance(implied, ErrorClassifier)
    assert isinstance(explicit, ErrorClassifier)
    explicit.take_over(implied)
    state.forget(implied)
    state.attached.remove(implied)
    state.policies.clear()


def _kind(middleware: PolicyMiddleware) -> str:
    """The name of the class of ours that it is an instance of, perhaps of a subclass."""
    return next(cls.__name__ for cls in type(middleware).__mro__ if PolicyMiddleware in cls.__bases__)


def _attach(state: BrokerState, middleware: PolicyMiddleware) -> None:
    if middleware.attached_to not in (None, state):
        raise ConfigurationError(
            f"This {type(middleware).__name__} is on another broker already. Make one for each broker."
        )
    middleware.attached_to = state
    state.attached.append(middleware)
    if isinstance(middleware, Timeout):
        state.timeout = middleware
    middleware.attach(state)


def _ordered(present: list[Middleware], ours: dict[str, PolicyMiddleware]) -> list[Middleware]:
    classifier, timeout = ours["ErrorClassifier"], ours.get("Timeout")
    assert isinstance(classifier, ErrorClassifier)
    kinds = {type(middleware) for middleware in present}
    listeners = [ours[kind] for kind in _LISTENERS if kind in ours]
    ordered: list[Middleware] = []
    for middleware in present:
        if type(middleware) is Retries:
            classifier.take_over(middleware)
            ordered += [classifier, *listeners]
        elif type(middleware) is TimeLimit and isinstance(timeout, Timeout):
            timeout.take_over(middleware)
            ordered.append(timeout)
        elif middleware is classifier:
            ordered += [] if Retries in kinds else [classifier, *listeners]
        elif middleware is timeout:
            ordered += [] if TimeLimit in kinds else [timeout]
        elif not isinstance(middleware, PolicyMiddleware):
            ordered.append(_replace_stock(middleware))
    return ordered if classifier in ordered else [*ordered, classifier, *listeners]


def _replace_stock(middleware: Middleware) -> Middleware:
    """Our version of a stock middleware that loses messages, with its settings; any other as it is."""
    if type(middleware) is StockPipelines:
        return Pipelines()
    if type(middleware) is StockCallbacks:
        return Callbacks()
    if type(middleware) is StockGroupCallbacks:
        return _with_its_settings(GroupCallbacks, middleware)
    if type(middleware) is StockResults:
        return storing(middleware)
    if type(middleware) is StockShutdownNotifications:
        return ShutdownNotifications(middleware.notify_shutdown)
    return middleware


def _with_its_settings(kind: type[Middleware], stock: Middleware) -> Middleware:
    ours = kind.__new__(kind)
    vars(ours).update(vars(stock))
    return ours


def _resolve_actors(state: BrokerState) -> None:
    """Check and resolve the options of actors that are new, and wrap their functions."""
    broker = state.broker
    for actor in list(broker.actors.values()):
        resolve_actor(state, actor)
    state.arranged_actors = len(broker.actors)


def resolve_actor(state: BrokerState, actor: Any) -> None:
    """Check one actor's options, keep them resolved, and wrap its function.

    Raises:
      ConfigurationError: If an option makes no sense.
    """
    known = state.policies.get(actor.actor_name)
    if (
        known is not None
        and known.options is actor.options
        and known.timeout is state.timeout
        and known.guarded_by is state.admission
    ):
        return
    classifier = next(m for m in state.attached if isinstance(m, ErrorClassifier))
    policy = ActorPolicy(actor, classifier.rules)
    policy.guard = resolve_guard(f"actor {actor.actor_name!r}", actor, policy.rules, state.guard_defaults)
    policy.guarded_by = state.admission
    if state.timeout is not None:
        validate(f"actor {actor.actor_name!r}", actor.options)
        policy.timeout_ms, policy.queue_timeout_ms = state.timeout.resolve(actor.options)
    policy.timeout = state.timeout
    state.policies[actor.actor_name] = policy
    wrap_actor(actor)


def _wrap_consume(state: BrokerState) -> None:
    """Have the broker hand out consumers of ours, each around one of its own."""
    stock = state.broker.consume

    @functools.wraps(stock)
    def consume(queue_name: str, *args: Any, **kwargs: Any) -> Consumer:
        if state.last_polled_at is not None:
            # While the broker is away, too: this is called again and again.
            state.last_polled_at[queue_name] = monotonic()
        prefetch = kwargs.get("prefetch", args[0] if args else 1)
        consumer = wrap_consumer(state, stock(queue_name, *args, **kwargs), queue_name, prefetch)
        consumer.prefetch = prefetch
        thread = threading.current_thread()
        if isinstance(thread, ConsumerThread):
            thread.delay_queue = consumer.delayed
            make_safe(thread.logger)
        return consumer

    state.broker.consume = consume  # type: ignore[method-assign]


PolicyMiddleware.arrange = staticmethod(arrange)  # type: ignore[method-assign]
PolicyMiddleware.resolve_actor = staticmethod(resolve_actor)  # type: ignore[method-assign]
