"""The reading of a queue, and the base class of the readers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dramatiq import Message
from dramatiq.broker import Broker
from dramatiq.common import q_name

from ..common.clock import now_ms
from ..common.safe_logger import SafeLogger
from ..delivery.delivery import READY_AT
from ..delivery.validation import decode, is_number

__all__ = ["ENDS", "QueueReader", "QueueReading", "oldest", "ready_at"]

logger = SafeLogger("dramatiq_policies.alerts")

#: Messages to check for their age at either end of a queue. A stopping worker puts messages back at the end.
ENDS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueReading:
    """The state of one queue. None means unknown on this broker.

    Attributes:
      queue: The queue's canonical name (never ``.DQ``).
      ready: Messages that wait for a worker.
      delayed: Messages sent with a delay, and retries. On RabbitMQ, workers hold these messages (up to 65,535 each). Messages of
        workers without a report are not counted.
      running: Messages taken by workers, running or prefetched. On RabbitMQ None if a worker sends no report.
      dead: Dead letters.
      oldest_ms: The age of the oldest ready message in ms, 0 with none. On RabbitMQ an estimate.
      stalled_ms: The time in ms during which messages were ready and no worker took one, as seen by this reader. 0 with none
        ready, and at the first reading.
    """

    queue: str
    ready: int | None = None
    delayed: int | None = None
    running: int | None = None
    dead: int | None = None
    oldest_ms: int | None = None
    stalled_ms: int | None = None


class QueueReader:
    """Reads the queues of one broker. This base class serves unknown brokers: every value is None, with one warning.

    Connects at the first reading, and again after an error. Not thread-safe.
    """

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        #: The latest `report` of every reachable process, including this process. None if only this process exists.
        self.peer_reports: list[dict[str, Any]] | None = None
        self._fronts: dict[str, tuple[Any, int]] = {}
        self._logged = False

    def queues(self) -> list[str]:
        """Return the canonical names of the declared queues, sorted."""
        return sorted({q_name(queue) for queue in self.broker.get_declared_queues()})

    def read_all(self, queues: Iterable[str] | None = None) -> list[QueueReading]:
        """Read each of these queues; by default all declared queues. Raises like `read`."""
        return [self.read(queue) for queue in (self.queues() if queues is None else queues)]

    def read(self, queue: str) -> QueueReading:
        """Read a queue. A missing queue counts as empty.

        Raises:
          dramatiq.errors.ConnectionClosed: The server can't be read. The text has the error of the server.
        """
        return self._read(q_name(queue), now_ms())

    def report(self) -> dict[str, Any]:
        """Return facts that only the workers of this process know, as JSON values."""
        return {}

    def close(self) -> None:
        """Close the connection. The next reading opens another."""

    def _read(self, queue: str, now: int) -> QueueReading:
        if not self._logged:
            self._logged = True
            logger.warning(
                "%s is an unknown broker type: the lengths of its queues can't be read. Everything else works.",
                type(self.broker).__name__,
            )
        return QueueReading(queue=queue)

    def _stalled(self, queue: str, front: object, now: int) -> int:
        """Return for how many ms the front of the queue has not changed. ``front`` is None for an empty queue."""
        seen, since = self._fronts.get(queue, (None, now))
        if front is None or front != seen:
            self._fronts[queue] = (front, now)
            return 0
        return now - since


def oldest(bodies: Iterable[bytes | str | None], now: int) -> int:
    """Return the age of the oldest message in ms. Unreadable bodies have no age."""
    since = now
    for body in bodies:
        if body is None:
            continue  # A worker took the message meanwhile.
        try:
            ready = ready_at(decode(body.encode() if isinstance(body, str) else body))
        except Exception:  # noqa: S112  An encoder may raise anything. The consumer reports the message.
            continue
        if ready is not None:
            since = min(since, ready)
    return now - since


def ready_at(message: Message[Any]) -> int | None:
    """Return the time since which the message is ready, in ms since the epoch. From plain Dramatiq: the time of creation."""
    ready: Any = message.options.get(READY_AT)
    if not is_number(ready):
        ready = message.message_timestamp
    return int(ready) if is_number(ready) else None
