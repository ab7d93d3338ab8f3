"""How the queues are, and which of them are late: what ``dramatiq-policies queues`` shows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dramatiq.errors import ConnectionClosed

from .._dramatiq import kind_of
from ..brokers.readers import QueueReader, QueueReading, reader_of
from ..middleware.queue_monitor import QueueMonitor
from ..observability.queue_thresholds import QueueAlert
from .app import OperationError, known_queues, redact
from .undeclared import find_any_queue, undeclared_queues

if TYPE_CHECKING:
    from dramatiq.broker import Broker

__all__ = ["QueueState", "monitor_of", "read_queues"]


@dataclass(frozen=True, slots=True)
class QueueState:
    """One queue now.

    Attributes:
      reading: What lies in it.
      breaches: The thresholds of the broker's QueueMonitor that it has reached.
      declared: Whether an actor uses it.
    """

    reading: QueueReading
    breaches: tuple[QueueAlert, ...] = ()
    declared: bool = True

    def asdict(self) -> dict[str, Any]:
        """For JSON."""
        breaches = [{name: getattr(one, name) for name in ("measure", "value", "threshold")} for one in self.breaches]
        found = {**asdict(self.reading), "breaches": breaches, "declared": self.declared}
        if not self.reading.ready:
            found["oldest_ms"] = None  # As "-" in the table: there is none.
        return found


def read_queues(broker: Broker, queues: Iterable[str] = (), *, reader: QueueReader | None = None) -> list[QueueState]:
    """Every queue, or these, read once; no message is taken.

    Parameters:
      reader: Of `dramatiq_policies.brokers.readers.reader_of`, for whoever reads again and again: it keeps its connection, and on
        RabbitMQ knows ages from the second reading on.

    Raises:
      OperationError: If a queue is unknown or the broker can't be reached.
    """
    chosen = [find_any_queue(broker, queue) for queue in queues]
    monitor = monitor_of(broker)
    own = reader_of(broker) if reader is None else reader
    try:
        if not chosen and reader is None:
            chosen = [*own.queues(), *undeclared_queues(broker)]
        readings = own.read_all(chosen or None)
    except ConnectionClosed as error:
        if kind_of(broker) == "rabbitmq":
            from ..brokers.rabbitmq.browser import unreachable

            raise unreachable(broker, error.__context__) from None
        raise OperationError(f"The broker can't be read: {redact(str(error))}") from None
    finally:
        if reader is None:
            own.close()
    declared = set(known_queues(broker))
    return [QueueState(reading, _breaches(monitor, reading), reading.queue in declared) for reading in readings]


def monitor_of(broker: Broker) -> QueueMonitor | None:
    """The broker's QueueMonitor, if it has one."""
    return next((middleware for middleware in broker.middleware if isinstance(middleware, QueueMonitor)), None)


def _breaches(monitor: QueueMonitor | None, reading: QueueReading) -> tuple[QueueAlert, ...]:
    threshold = None if monitor is None else monitor.threshold_of(reading.queue)
    if threshold is None:
        return ()
    return tuple(
        QueueAlert(queue=reading.queue, measure=measure, value=value, threshold=limit)
        for measure, value, limit in threshold.measures(reading)
        if value >= limit
    )
