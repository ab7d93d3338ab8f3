"""Read the queues and their thresholds, for ``dramatiq-policies queues``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dramatiq.errors import ConnectionClosed

from .._dramatiq import kind_of
from ..brokers.readers import QueueReader, QueueReading, reader_of
from ..common.middleware import find_middleware
from ..middleware.queue_monitor import QueueMonitor
from ..observability.queue_thresholds import OUTBOX, QueueAlert
from .app import OperationError, known_queues, one_line
from .outbox import read_outbox
from .undeclared import find_any_queue, undeclared_queues

if TYPE_CHECKING:
    from dramatiq.broker import Broker

__all__ = ["QueueState", "monitor_of", "read_outbox_row", "read_queues"]


@dataclass(frozen=True, slots=True)
class QueueState:
    """The state of a queue.

    Attributes:
      reading: The counts of messages.
      breaches: The exceeded thresholds of the broker's QueueMonitor.
      declared: Whether an actor uses the queue.
      is_outbox: Whether this is the outbox: ``ready`` counts the messages that wait there.
    """

    reading: QueueReading
    breaches: tuple[QueueAlert, ...] = ()
    declared: bool = True
    is_outbox: bool = False

    def asdict(self) -> dict[str, Any]:
        """For JSON."""
        breaches = [{name: getattr(one, name) for name in ("measure", "value", "threshold")} for one in self.breaches]
        found = {**asdict(self.reading), "breaches": breaches, "declared": self.declared}
        if not self.reading.ready:
            found["oldest_ms"] = None  # Printed as "-" in the table.
        if self.is_outbox:
            found.update(queue="outbox", outbox=True)
        return found


def read_queues(broker: Broker, queues: Iterable[str] = (), *, reader: QueueReader | None = None) -> list[QueueState]:
    """Read all queues, or the given ones, once. Takes no message.

    Parameters:
      reader: Of `dramatiq_policies.brokers.readers.reader_of`, for repeated readings: the reader keeps its connection,
      and on RabbitMQ estimates ages from the second reading on.

    Raises:
      OperationError: A queue is unknown or the broker can't be reached.
    """
    chosen = [find_any_queue(broker, queue) for queue in queues]
    monitor = monitor_of(broker)
    own = reader_of(broker) if reader is None else reader
    try:
        if not chosen and reader is None:
            chosen = [*own.queues(), *undeclared_queues(broker)]
        readings = own.read_all(chosen or None)
    except ConnectionClosed as error:
        raise _unreachable(broker, error) from None
    finally:
        if reader is None:
            own.close()
    declared = set(known_queues(broker))
    return [QueueState(reading, _breaches(monitor, reading), reading.queue in declared) for reading in readings]


def read_outbox_row(broker: Broker) -> QueueState | None:
    """Return the state of the outbox as a row of the queues; None without an outbox.

    Raises:
      OperationError: The database can't be read, or has no table.
    """
    stats = read_outbox(broker)
    if stats is None:
        return None
    reading = QueueReading(queue=OUTBOX, ready=stats.pending, oldest_ms=stats.oldest_ms)
    return QueueState(reading, _breaches(monitor_of(broker), reading), is_outbox=True)


def _unreachable(broker: Any, error: ConnectionClosed) -> OperationError:
    cause = error.__cause__ or error.__context__ or error
    if kind_of(broker) == "rabbitmq":
        from ..brokers.rabbitmq import browser as rabbitmq

        return rabbitmq.unreachable(broker, error.__context__)
    if kind_of(broker) == "redis":
        from ..brokers.redis import browser as redis

        return redis.unreachable(getattr(broker, "client", None), cause)
    return OperationError(f"The broker can't be reached ({one_line(error)}).")


def monitor_of(broker: Broker) -> QueueMonitor | None:
    """Return the broker's QueueMonitor, or None."""
    return find_middleware(broker, QueueMonitor)


def _breaches(monitor: QueueMonitor | None, reading: QueueReading) -> tuple[QueueAlert, ...]:
    threshold = None if monitor is None else monitor.threshold_of(reading.queue)
    if threshold is None:
        return ()
    return tuple(
        QueueAlert.of(reading.queue, measure, value, limit)
        for measure, value, limit in threshold.measures(reading)
        if value >= limit
    )
