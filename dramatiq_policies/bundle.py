"""Add dramatiq_policies to a broker: `install`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeVar

from dramatiq.broker import Broker

from .errors import ConfigurationError
from .middleware.base import PolicyMiddleware
from .middleware.discard_logger import DiscardLogger
from .middleware.error_classifier import ErrorClassifier
from .middleware.idempotency import Idempotency
from .middleware.ordering import kind_of_ours, order_middleware
from .middleware.timeout import Timeout

if TYPE_CHECKING:
    from .middleware.heartbeat import Heartbeat
    from .middleware.metrics import Metrics
    from .middleware.queue_monitor import QueueMonitor
    from .middleware.sentry import SentryReporter
    from .transactions.outbox import Outbox

__all__ = ["install"]

B = TypeVar("B", bound=Broker)


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
    outbox: Outbox | None = None,
) -> B:
    """Add the middleware of dramatiq_policies to a broker, and return the broker.

    Call it before you declare actors: without it, Dramatiq refuses options such as ``retry_on``. ::

        import dramatiq
        from dramatiq.brokers.redis import RedisBroker
        from dramatiq_policies import ErrorClassifier, RetryPolicy, install

        broker = install(
            RedisBroker(url="redis://localhost:6379/0"),
            error_classifier=ErrorClassifier(unclassified=RetryPolicy(attempts=5)),
        )
        dramatiq.set_broker(broker)

    The ErrorClassifier takes the place of Dramatiq's ``Retries``, Timeout the place of ``TimeLimit``.

    Parameters:
      broker: Any Dramatiq broker.
      error_classifier: Default: an `ErrorClassifier` with the settings of the broker's ``Retries``.
      timeout: Default: a `Timeout` with the limit of the broker's ``TimeLimit`` (ten minutes).
      idempotency: Default: an `Idempotency` on a RedisBroker or a StubBroker, and none on other brokers, which need a
        store of your choice. False for none.
      discard_logger: Default: a `DiscardLogger`. False for none.
      metrics: A `Metrics`. Default: none.
      sentry: A `SentryReporter`. Default: none.
      queue_monitor: A `QueueMonitor`. Default: none.
      heartbeat: A `Heartbeat`. Default: none.
      outbox: A `SqlOutbox` or `DjangoOutbox`. Default: none.

    Raises:
      ConfigurationError: The broker has middleware of dramatiq_policies already, or an argument has the wrong type.
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
        None if outbox is None else _expected("outbox", outbox, "Outbox", "a SqlOutbox, a DjangoOutbox"),
    ]
    for middleware in broker.middleware:
        if isinstance(middleware, PolicyMiddleware):
            raise ConfigurationError(
                f"install(): the broker already has {type(middleware).__name__}. Call install() once, or "
                "add each middleware yourself."
            )
    broker.middleware = [*broker.middleware, *(middleware for middleware in given if middleware is not None)]
    order_middleware(broker)
    return broker


def _idempotency(broker: Broker, given: Idempotency | Literal[False] | None) -> PolicyMiddleware | None:
    if given is False or (given is None and not Idempotency.has_default_store(broker)):
        return None
    return _checked("idempotency", given, Idempotency)


def _checked(name: str, value: object, kind: type[PolicyMiddleware]) -> PolicyMiddleware:
    return kind() if value is None else _expected(name, value, kind.__name__)


def _expected(name: str, value: object, kind: str, expected: str = "") -> PolicyMiddleware:
    if not isinstance(value, PolicyMiddleware) or kind_of_ours(value) != kind:
        raise ConfigurationError.of_option("install()", name, f"{expected or f'a {kind}'} or None", value, secret=True)
    return value
