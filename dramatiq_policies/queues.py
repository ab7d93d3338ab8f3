"""How many messages wait in each queue, and for how long: read without taking one, on each of the three brokers.

Redis: keys are read, and none of Dramatiq's commands is sent, for each of those registers a heartbeat. RabbitMQ:
passive declares on a connection of our own; what they can't say is worked out from what was seen before, see
`RabbitmqReader`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dramatiq import Message
from dramatiq.broker import Broker
from dramatiq.common import dq_name, q_name, xq_name
from dramatiq.errors import ConnectionClosed

from .delivery import READY_AT
from .history import now_ms
from .shape import is_number
from .wiring import wiring_of

__all__ = ["QueueReader", "QueueReading", "own_client", "reader_of"]

logger = logging.getLogger("dramatiq_policies.alerts")

#: Of how many messages at either end of a queue the age is read: those put back by a worker lie at the end.
_ENDS = 16
#: Seconds that Redis may take to answer a reader.
_PATIENCE = 5
#: How many earlier readings of a queue are remembered at most.
_MARKS = 1_024


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueReading:
    """What lay in one queue. None is what can't be known on this broker.

    Attributes:
      queue: The queue's canonical name (never ``.DQ``).
      ready: Messages that wait for a worker.
      delayed: Messages whose time had not come when they were sent: delayed ones and retries. On RabbitMQ without those
        that workers hold, which take up to a thousand per thread in advance.
      running: Messages that a worker has taken, whether a job runs yet or not. On RabbitMQ None while a worker lives.
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
        #: What other processes have said in `taken_here`, for those readers that have a use for it.
        self.taken_elsewhere: list[dict[str, list[Any]]] = []
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

    def taken_here(self) -> dict[str, list[Any]]:
        """The message that this process took last from each queue: its id and since when it was ready."""
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


class StubReader(QueueReader):
    """Reads a StubBroker's queues, which are in memory."""

    def _read(self, queue: str, now: int) -> QueueReading:
        broker: Any = self.broker
        work, later = broker.queues.get(queue), broker.queues.get(dq_name(queue))
        bodies = [] if work is None else list(work.queue)
        return QueueReading(
            queue=queue,
            ready=len(bodies),
            delayed=0 if later is None else later.unfinished_tasks,
            running=0 if work is None else max(0, work.unfinished_tasks - len(bodies)),
            dead=len(broker.dead_letters_by_queue.get(queue, ())),
            oldest_ms=_oldest([*bodies[:_ENDS], *bodies[_ENDS:][-_ENDS:]], now),
            stalled_ms=self._stalled(queue, bodies[0] if bodies else None, now),
        )


class RedisReader(QueueReader):
    """Reads Dramatiq's keys, over a connection of its own.

    The age is that of the oldest of the first and the last messages of the list, by the clock of whoever sent it. What
    a worker puts back when it stops lies at the end, and is not the oldest again until it comes near the front.
    """

    def __init__(self, broker: Broker) -> None:
        super().__init__(broker)
        self._client: Any = None

    def _read(self, queue: str, now: int) -> QueueReading:
        import redis

        broker: Any = self.broker
        key, later = f"{broker.namespace}:{queue}", f"{broker.namespace}:{dq_name(queue)}"
        if self._client is None:
            self._client = own_client(broker.client)
        try:
            with self._client.pipeline() as all_at_once:
                all_at_once.llen(key).hlen(f"{key}.msgs").hlen(f"{later}.msgs")
                all_at_once.zcard(f"{broker.namespace}:{xq_name(queue)}")
                all_at_once.lrange(key, 0, _ENDS - 1).lrange(key, -_ENDS, -1)
                ready, held, delayed, dead, first, last = all_at_once.execute()
            ids = list(dict.fromkeys((*first, *last)))
            bodies = self._client.hmget(f"{key}.msgs", ids) if ids else []
        except (redis.RedisError, OSError) as error:
            raise ConnectionClosed(error) from None
        return QueueReading(
            queue=queue,
            ready=ready,
            delayed=delayed,
            running=max(0, held - ready),
            dead=dead,
            oldest_ms=_oldest(bodies, now),
            stalled_ms=self._stalled(queue, first[0] if first else None, now),
        )

    def close(self) -> None:
        if self._client is not None:
            self._client.connection_pool.disconnect()
        self._client = None


class RabbitmqReader(QueueReader):
    """Reads the counts of passive declares, over a connection of its own, and works out the age.

    Looking at the oldest message would be to take it, and each time it is put back counts against a quorum queue's
    delivery limit. So the age is what it can be at most: a queue is first in, first out, and its oldest message became
    ready

    - after the one that a worker of this process, or of one that it has heard of, took last (redelivered ones aside),
      and
    - after the latest reading of whose messages at least as many have gone since as lay there then; an empty queue is
      the simplest case.

    The smaller of both counts. So it is right to within the interval of the readings for a queue that is emptied between
    them, or that such a worker takes from; it is too long, and never too short, for one that is never empty and that only
    others take from: by the time that a message takes through the queue, and for as long as the queue only grows. Before
    either is known it is None at the first reading, then the time since that one. Queues with priorities (``x-max-priority``) are not first
    in, first out: what waits behind those may be older.
    """

    def __init__(self, broker: Broker) -> None:
        super().__init__(broker)
        self._connection: Any = None
        self._channel: Any = None
        self._flows: dict[str, _Flow] = {}

    def _read(self, queue: str, now: int) -> QueueReading:
        from pika.exceptions import AMQPError

        try:
            try:
                counts = self._counts(queue)
            except (AMQPError, OSError):
                # An idle connection is often gone: once more, on a new one.
                self.close()
                counts = self._counts(queue)
        except (AMQPError, OSError) as error:
            self.close()
            raise ConnectionClosed(f"{type(error).__name__}: {error}") from None
        (ready, consumers), (delayed, _), (dead, _) = counts
        flow = self._flows.setdefault(queue, _Flow(now))
        flow.saw(ready, now)
        taken = [said[queue] for said in (self.taken_here(), *self.taken_elsewhere) if queue in said]
        after = [since for since in (flow.after, *(since for _, since in taken)) if since is not None]
        if not ready:
            oldest: int | None = 0
        elif after:
            oldest = max(0, now - max(after))
        else:
            oldest = None if flow.first == now else now - flow.first
        return QueueReading(
            queue=queue,
            ready=ready,
            delayed=delayed,
            running=None if consumers else 0,
            dead=dead,
            oldest_ms=oldest,
            stalled_ms=self._stalled(queue, (flow.gone, frozenset(map(tuple, taken))) if ready else None, now),
        )

    def taken_here(self) -> dict[str, list[Any]]:
        taken = wiring_of(self.broker).taken or {}
        return {queue: [message.message_id, _ready_at(message)] for queue, message in list(taken.items())}

    def _counts(self, queue: str) -> list[tuple[int, int]]:
        """How many messages are ready in the queue, its delay and its dead-letter queue; and each one's consumers."""
        import pika
        from pika.exceptions import ChannelClosedByBroker

        if self._connection is None or not self._connection.is_open:
            broker: Any = self.broker
            self._connection = pika.BlockingConnection(parameters=broker.parameters)
            self._channel = None
        counts = []
        for name in (queue, dq_name(queue), xq_name(queue)):
            if self._channel is None or not self._channel.is_open:
                self._channel = self._connection.channel()
            try:
                found = self._channel.queue_declare(name, passive=True).method
            except ChannelClosedByBroker as error:
                if error.reply_code != 404:
                    raise
                counts.append((0, 0))
            else:
                counts.append((found.message_count, found.consumer_count))
        return counts

    def close(self) -> None:
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None and connection.is_open:
            from pika.exceptions import AMQPError

            with suppress(AMQPError, OSError):
                connection.close()


class _Flow:
    """What a queue's counts, one after the other, say of when its oldest message came.

    ``gone`` is how many messages were seen to go: each fall of the count is that many at least. A reading that saw n
    messages when g had gone is over once g + n have: all that lay there then has gone, and the oldest came later.
    """

    def __init__(self, now: int) -> None:
        self.first = now
        #: The oldest message came after this time, None if nothing is known.
        self.after: int | None = None
        self.gone = 0
        self._last = 0
        #: (g + n, when), both rising; of the readings with one sum the latest.
        self._marks: deque[tuple[int, int]] = deque()

    def saw(self, count: int, now: int) -> None:
        self.gone += max(0, self._last - count)
        self._last = count
        if self._marks and self._marks[-1][0] == self.gone + count:
            self._marks.pop()
        self._marks.append((self.gone + count, now))
        while self._marks and self._marks[0][0] <= self.gone:
            self.after = self._marks.popleft()[1]
        if len(self._marks) > _MARKS:
            self._marks = deque(list(self._marks)[::2])


_READERS: dict[str, type[QueueReader]] = {
    "dramatiq.brokers.redis.RedisBroker": RedisReader,
    "dramatiq.brokers.rabbitmq.RabbitmqBroker": RabbitmqReader,
    "dramatiq.brokers.stub.StubBroker": StubReader,
}


def reader_of(broker: Broker) -> QueueReader:
    """A reader of the broker's queues, of the kind that the broker is. It connects when it is first used."""
    # By name, so that no client is imported that is not in use.
    for cls in type(broker).__mro__:
        kind = _READERS.get(f"{cls.__module__}.{cls.__name__}")
        if kind is not None:
            return kind(broker)
    return QueueReader(broker)


def own_client(client: Any) -> Any:
    """A client of the same server with connections of its own, which do not wait for ever; close it by its pool."""
    import redis

    pool = client.connection_pool
    settings = {**pool.connection_kwargs, "socket_timeout": _PATIENCE, "socket_connect_timeout": _PATIENCE}
    if hasattr(pool, "service_name"):
        # Sentinel's: it asks where the server is.
        settings.pop("connection_pool", None)
        return redis.Redis(connection_pool=type(pool)(pool.service_name, pool.sentinel_manager, **settings))
    return redis.Redis(connection_pool=redis.ConnectionPool(connection_class=pool.connection_class, **settings))


def _oldest(bodies: Iterable[bytes | str | None], now: int) -> int:
    """How long the oldest of these has been ready, in milliseconds; what can't be read has no age."""
    since = now
    for body in bodies:
        if body is None:
            continue  # Taken meanwhile.
        try:
            message: Message[Any] = Message.decode(body.encode() if isinstance(body, str) else body)
            ready = _ready_at(message)
        except Exception:  # noqa: S112  Whatever an encoder raises; the consumer dead-letters and reports it.
            continue
        if ready is not None:
            since = min(since, ready)
    return now - since


def _ready_at(message: Message[Any]) -> int | None:
    """Since when the message is ready, in ms since the epoch. One sent by stock Dramatiq: since it was made."""
    ready: Any = message.options.get(READY_AT)
    if not is_number(ready):
        ready = message.message_timestamp
    return int(ready) if is_number(ready) else None
