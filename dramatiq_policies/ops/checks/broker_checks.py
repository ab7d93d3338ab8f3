"""Check a broker's middleware."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from dramatiq.middleware import Callbacks as StockCallbacks
from dramatiq.middleware import GroupCallbacks as StockGroupCallbacks
from dramatiq.middleware import Middleware, Retries, TimeLimit
from dramatiq.middleware import Pipelines as StockPipelines
from dramatiq.middleware import ShutdownNotifications as StockShutdownNotifications

from ..._dramatiq import kind_of
from ...common.durations import LikelySeconds
from ...common.middleware import find_middleware
from ...delivery.broker_state import state_of
from ...middleware.base import PolicyMiddleware, conflicting_stock
from ...middleware.composition import Callbacks, GroupCallbacks, Pipelines
from ...middleware.error_classifier import ErrorClassifier
from ...middleware.idempotency import Idempotency
from ...middleware.queue_monitor import QueueMonitor
from ...middleware.shutdown import ShutdownNotifications
from ...middleware.timeout import Timeout
from ...stores.memory import MemoryStore
from ...transactions.outbox import outbox_on

if TYPE_CHECKING:
    from dramatiq.broker import Broker

__all__ = ["OF_BROKERS", "Found", "named"]

#: The code and the text of each finding.
Found = Iterator[tuple[str, str]]


def named(broker: Broker, name: str) -> Any:
    """Find a dramatiq_policies middleware by class name, without importing the module; None if absent."""
    for middleware in broker.middleware:
        if name in {cls.__name__ for cls in type(middleware).__mro__} and isinstance(middleware, PolicyMiddleware):
            return middleware
    return None


#: A middleware of Dramatiq, and the replacement of dramatiq_policies. Both on one broker conflict.
_REPLACED: tuple[tuple[type[Middleware], type[Middleware]], ...] = ((Retries, ErrorClassifier), (TimeLimit, Timeout))
#: A middleware of Dramatiq, and our subclass. `install` does not replace subclasses written by users.
_WITH_HOLES: tuple[tuple[type[Middleware], type[Middleware]], ...] = (
    (StockCallbacks, Callbacks),
    (StockPipelines, Pipelines),
    (StockGroupCallbacks, GroupCallbacks),
    (StockShutdownNotifications, ShutdownNotifications),
)
_SENDING: tuple[type[Middleware], ...] = (StockCallbacks, StockPipelines)


def _leftovers(broker: Broker) -> Found:
    for stock, ours in _REPLACED:
        if any(isinstance(middleware, ours) for middleware in broker.middleware):
            for name in conflicting_stock(broker, stock, ours):
                yield "DP013", f"{name} is a {stock.__name__} and conflicts with {ours.__name__}"
    for stock, ours in _WITH_HOLES:
        for name in conflicting_stock(broker, stock, ours):
            yield (
                "DP025",
                f"{name} is a subclass of Dramatiq's {stock.__name__}, and install() does not replace subclasses",
            )
    for stock in _SENDING:
        if sum(isinstance(middleware, stock) for middleware in broker.middleware) > 1:
            yield "DP013", f"The broker has two {stock.__name__}: each follow-up message is sent twice"


def _thresholds(broker: Broker) -> Found:
    monitor = find_middleware(broker, QueueMonitor)
    if monitor is None:
        yield "DP019", "The broker has no QueueMonitor: a backlog alerts nobody"
        return
    for queue in sorted({actor.queue_name for actor in broker.actors.values()}):
        if monitor.threshold_of(queue) is None:
            yield "DP019", f"The queue {queue!r} has no threshold"
    has_outbox = outbox_on(state_of(broker)) is not None
    if has_outbox and monitor.outbox is None:
        yield "DP031", "The outbox has no threshold"
    elif monitor.outbox is not None and not has_outbox:
        yield "DP031", "QueueMonitor has a threshold for the outbox, and the broker has no outbox"


def _memory_store(broker: Broker) -> Found:
    idempotency = find_middleware(broker, Idempotency)
    if idempotency is not None and isinstance(idempotency.store, MemoryStore) and kind_of(broker) != "stub":
        yield "DP024", "Idempotency has a MemoryStore: other processes see no records"


#: The attributes of middleware that hold milliseconds, named as the arguments.
_DURATIONS = (
    *("default", "queue_default", "grace_ms", "lease", "ttl", "wait", "interval", "silence"),
    *("alert_interval", "max_snooze", "min_backoff", "max_backoff"),
)


def _durations(broker: Broker) -> Found:
    declared: list[tuple[str, Any]] = []
    for middleware in broker.middleware:
        if isinstance(middleware, PolicyMiddleware):
            declared += [(name.removesuffix("_ms"), vars(middleware).get(name)) for name in _DURATIONS]
        if isinstance(middleware, QueueMonitor):
            declared += _threshold_durations(middleware)
        elif isinstance(middleware, ErrorClassifier):
            for policy in (middleware.unclassified, *(rule.policy for rule in middleware.rules)):
                if policy is not None:
                    declared += [("max_elapsed", policy.max_elapsed), *wait_durations(policy.wait)]
    yield from seconds_found(declared)


def _threshold_durations(monitor: QueueMonitor) -> list[tuple[str, Any]]:
    """Return the durations of a monitor's thresholds, by name."""
    return [(name, getattr(one, name)) for one in monitor.thresholds for name in ("oldest", "stalled")]


def wait_durations(wait: object) -> list[tuple[str, Any]]:
    """Return the durations of a wait, by name."""
    fields = vars(wait) if hasattr(type(wait), "declared_as") else {}
    found = [(name, fields[name]) for name in ("initial", "maximum", "scale", "ms") if name in fields]
    return found + (wait_durations(fields["fallback"]) if "fallback" in fields else [])


def seconds_found(declared: Iterable[tuple[str, Any]]) -> Found:
    """Yield a finding for each duration that was declared as a number that looks like seconds."""
    for option, value in dict.fromkeys(one for one in declared if isinstance(one[1], LikelySeconds)):
        yield "DP027", f"{option}={value} is {value} milliseconds"


OF_BROKERS: tuple[Callable[[Broker], Found], ...] = (
    _leftovers,
    _thresholds,
    _memory_store,
    _durations,
)
