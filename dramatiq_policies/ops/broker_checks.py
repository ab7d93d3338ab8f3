"""What the production gate looks for in a broker's middleware."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from dramatiq.middleware import Retries, TimeLimit

from .._dramatiq import is_stub_broker
from ..middleware.base import PolicyMiddleware
from ..middleware.error_classifier import ErrorClassifier
from ..middleware.idempotency import Idempotency
from ..middleware.queue_monitor import QueueMonitor
from ..middleware.timeout import Timeout
from ..stores.memory import MemoryStore

if TYPE_CHECKING:
    from dramatiq.broker import Broker

__all__ = ["OF_BROKERS", "Found", "named"]

#: The code and the text of each finding.
Found = Iterator[tuple[str, str]]


def named(broker: Broker, name: str) -> Any:
    """A middleware of ours by its class's name, for those whose module may not be imported; None if there is none."""
    for middleware in broker.middleware:
        if name in {cls.__name__ for cls in type(middleware).__mro__} and isinstance(middleware, PolicyMiddleware):
            return middleware
    return None


def _leftovers(broker: Broker) -> Found:
    for middleware in broker.middleware:
        for stock, ours in ((Retries, ErrorClassifier), (TimeLimit, Timeout)):
            if isinstance(middleware, stock) and not isinstance(middleware, ours):
                both = any(isinstance(other, ours) for other in broker.middleware)
                if both:
                    yield (
                        "DP013",
                        f"{type(middleware).__name__} is a {stock.__name__} and works against {ours.__name__}",
                    )


def _thresholds(broker: Broker) -> Found:
    monitor = next((middleware for middleware in broker.middleware if isinstance(middleware, QueueMonitor)), None)
    if monitor is None:
        yield "DP019", "No QueueMonitor is on the broker: nobody is told when a queue backs up"
        return
    for queue in sorted({actor.queue_name for actor in broker.actors.values()}):
        if monitor.threshold_of(queue) is None:
            yield "DP019", f"The queue {queue!r} has no threshold"


_EXTRAS = {"Metrics": ("statsd", "statsd"), "SentryReporter": ("sentry_sdk", "sentry")}


def _extras(broker: Broker) -> Found:
    for name, (module, extra) in _EXTRAS.items():
        middleware = named(broker, name)
        if middleware is not None and getattr(middleware, "client", None) is None and not _installed(module):
            yield "DP021", f'{name} needs {module}: pip install "dramatiq-policies[{extra}]"'


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _memory_store(broker: Broker) -> Found:
    idempotency = next((middleware for middleware in broker.middleware if isinstance(middleware, Idempotency)), None)
    if idempotency is not None and isinstance(idempotency.store, MemoryStore) and not is_stub_broker(broker):
        yield "DP024", "Idempotency has a MemoryStore"


OF_BROKERS: tuple[Callable[[Broker], Found], ...] = (
    _leftovers,
    _thresholds,
    _extras,
    _memory_store,
)
