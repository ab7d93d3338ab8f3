"""What is read of a queue, and what the readers have in common."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dramatiq import Message
from dramatiq.broker import Broker
from dramatiq.common import q_name

from ..common.safe_logger import SafeLogger
from ..delivery.delivery import READY_AT
from ..delivery.history import now_ms
from ..delivery.validation import decode, is_number

__all__ = ["ENDS", "QueueReader", "QueueReading", "oldest", "ready_at"]

logger = SafeLogger("dramatiq_policies.alerts")

#: Of how many messages at either end of a queue the age is read: those put back by a worker lie at the end.
ENDS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueReading:
    """What lay in one queue. None is what can't be known on this broker.

    Attributes:
      queue: The queue's canonical name (never ``.DQ``).
      ready: Messages that wait for a worker.
      delayed: Messages whose time had not come when they were sent: delayed ones and retries. On RabbitMQ without those
        held by workers that are not heard; workers hold all of them, up to 65,535 each.
      running: Messages that a worker has taken, whether a job runs yet or not. On RabbitMQ None while there is a worker
        that is not heard.
      dead: Dead letters.
      oldest_ms: For how long the oldest ready message has been ready, 0 with none. On RabbitMQ an estimate.
      stalled_ms: For how long messages have been ready while none was taken, as far as this reader has seen; 0 with
        none ready, and at its first reading.
    """

    queue: str
    ready: int | None = None
    delayed: int | None = None
    running: int | None = None
    dead: int | None = None
    oldest_ms: int | None = None
    stalled_ms: int | None = None


class QueueReader:
    """Reads the queues of one broker; this one, of a broker that it does not know, says so once and knows nothing.

    It connects at the first reading, and again after an error. One thread at a time may use it.
    """

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        #: The latest `report` of every process that can be heard, this one's included; None if there is only this one.
        self.peer_reports: list[dict[str, Any]] | None = None
        self._fronts: dict[str, tuple[Any, int]] = {}
        self._said = False

    def queues(self) -> list[str]:
        """The canonical names of the queues that the broker has declared, sorted."""
        return sorted({q_name(queue) for queue in self.broker.get_declared_queues()})

    def read_all(self, queues: Iterable[str] | None = None) -> list[QueueReading]:
        """One reading of each of these queues, by default of all that are declared. Raises as `read` does."""
        return [self.read(queue) for queue in (self.queues() if queues is None else queues)]

    def read(self, queue: str) -> QueueReading:
        """One reading of a queue; one that does not exist on the server is empty.

        Raises:
          dramatiq.errors.ConnectionClosed: If the server can't be read; its error is in the text.
        """
        return self._read(q_name(queue), now_ms())

    def report(self) -> dict[str, Any]:
        """What the workers of this process know and the server does not say; it can be written as JSON."""
        return {}

    def close(self) -> None:
        """Close what it has opened. It may be used again."""

    def _read(self, queue: str, now: int) -> QueueReading:
        if not self._said:
            self._said = True
            logger.warning(
                "How %s stores messages is not known: how long its queues are can't be read. All else works.",
                type(self.broker).__name__,
            )
        return QueueReading(queue=queue)

    def _stalled(self, queue: str, front: Any, now: int) -> int:
        """Since when the front of the queue is the same; None is that of an empty queue."""
        seen, since = self._fronts.get(queue, (None, now))
        if front is None or front != seen:
            self._fronts[queue] = (front, now)
            return 0
        return now - since


def oldest(bodies: Iterable[bytes | str | None], now: int) -> int:
    """How long the oldest of these has been ready, in milliseconds; what can't be read has no age."""
    since = now
    for body in bodies:
        if body is None:
            continue  # Taken meanwhile.
        try:
            ready = ready_at(decode(body.encode() if isinstance(body, str) else body))
        except Exception:  # noqa: S112  Whatever an encoder raises; the consumer dead-letters and reports it.
            continue
        if ready is not None:
            since = min(since, ready)
    return now - since


def ready_at(message: Message[Any]) -> int | None:
    """Since when the message is ready, in ms since the epoch. One sent by stock Dramatiq: since it was made."""
    ready: Any = message.options.get(READY_AT)
    if not is_number(ready):
        ready = message.message_timestamp
    return int(ready) if is_number(ready) else None
