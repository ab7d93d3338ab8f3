"""Read queues on RabbitMQ by passive declares over a separate connection."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from copy import copy
from typing import Any

import pika
from dramatiq.broker import Broker
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.common import dq_name, xq_name
from dramatiq.errors import ConnectionClosed
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPError, ChannelClosedByBroker

from ... import _dramatiq
from ...common.connections import discard, is_async_exception
from ...delivery.broker_state import state_of
from ..queue_reader import QueueReader, QueueReading, ready_at
from .acks import UnackedCounts

__all__ = ["AgeEstimate", "RabbitmqQueueReader"]

_LOST = (AMQPError, AMQPConnectorException, OSError)
#: Seconds to wait for a new connection.
_TIMEOUT = 5
#: The limit of remembered readings per queue.
MARKS = 1_024


class RabbitmqQueueReader(QueueReader):
    """Reads the counts of passive declares and estimates the age of the oldest message.

    RabbitMQ does not tell how many messages a consumer holds. Workers report the number (`report`). If a worker sends no report,
    ``running`` is None, and ``delayed`` lacks the messages of this worker.

    Reading the oldest message would mean taking the message, and each return counts against the delivery limit of a quorum queue.
    So the reader gives an upper bound. A queue is first in, first out, so the oldest message became ready

    - after the last message taken by a reporting worker (redeliveries aside), and
    - after each earlier reading whose messages have all left the queue since.

    The later time counts. The bound is exact to one interval of readings if the queue runs empty or if reporting workers consume.
    If only other workers consume and the queue never runs empty, the bound is too long by the transit time of the queue, and for as
    long as the queue only grows. At the first reading the age may be None; afterwards, without other knowledge, the age is the time
    since the first reading. Queues with priorities (``x-max-priority``) are not first in, first out, so older messages may wait.
    """

    broker: RabbitmqBroker

    def __init__(self, broker: Broker) -> None:
        super().__init__(broker)
        self._connection: Any = None
        self._channel: Any = None
        self._ages: dict[str, AgeEstimate] = {}

    def _read(self, queue: str, now: int) -> QueueReading:
        idle = self._connection is not None
        try:
            try:
                counts = self._counts(queue)
            except _LOST:
                if not idle:
                    raise
                # An idle connection is often closed by the server: try a new connection.
                self.close()
                counts = self._counts(queue)
        except _LOST as error:
            self.close()
            raise ConnectionClosed(f"{type(error).__name__}: {error}") from None
        except BaseException as error:
            if is_async_exception(error):
                discard(self._take())
            raise
        (ready, consumers), (delayed, holders), (dead, _) = counts
        reports = [self.report()] if self.peer_reports is None else self.peer_reports
        age = self._ages.setdefault(queue, AgeEstimate(now))
        age.observe(ready, now)
        taken = [report["taken"][queue] for report in reports if queue in report.get("taken", ())]
        after = [since for since in (age.after, *(since for _, since in taken)) if since is not None]
        running, ahead = (
            [report["held"][name] for report in reports if name in report.get("held", ())]
            for name in (queue, dq_name(queue))
        )
        return QueueReading(
            queue=queue,
            ready=ready,
            delayed=delayed + (sum(ahead) if holders else 0),
            running=0 if not consumers else sum(running) if len(running) == consumers else None,
            dead=dead,
            oldest_ms=self._age(age, max(after, default=None), now) if ready else 0,
            stalled_ms=self._stalled(queue, (age.departed, frozenset(map(tuple, taken))) if ready else None, now),
        )

    @staticmethod
    def _age(age: AgeEstimate, after: int | None, now: int) -> int | None:
        if after is not None:
            return max(0, now - after)
        return None if age.first == now else now - age.first

    def report(self) -> dict[str, Any]:
        state = state_of(self.broker)
        taken = list((state.last_received or {}).items())
        return {
            "taken": {queue: [message.message_id, ready_at(message)] for queue, message in taken},
            "held": {queue: held() for queue, held in list(state.shared(UnackedCounts).by_queue.items())},
        }

    def _counts(self, queue: str) -> list[tuple[int, int]]:
        """Return (ready messages, consumers) of the work queue, the delay queue and the dead-letter queue."""
        if self._connection is None or not self._connection.is_open:
            self._connection = pika.BlockingConnection(parameters=self._parameters())
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

    def _parameters(self) -> Any:
        """Return the parameters of the broker, with our timeouts."""
        copies = [copy(one) for one in _dramatiq.rabbitmq_parameters(self.broker)]
        for one in copies:
            one.socket_timeout = one.stack_timeout = _TIMEOUT
        return copies

    def _take(self) -> Any:
        connection, self._connection, self._channel = self._connection, None, None
        return connection

    def close(self) -> None:
        connection = self._take()
        if connection is not None and connection.is_open:
            with suppress(*_LOST):
                connection.close()


class AgeEstimate:
    """Estimates from consecutive counts when the oldest message of a queue arrived.

    ``departed`` counts the messages that have left the queue: at least the sum of all falls of the count. After a reading of n messages
    at ``departed`` = g, all n messages have left once ``departed`` reaches g + n. The oldest message then arrived after this reading.
    """

    def __init__(self, now: int) -> None:
        self.first = now
        #: The oldest message arrived after this time. None if unknown.
        self.after: int | None = None
        self.departed = 0
        self._last = 0
        #: (g + n, time), both rising. Of readings with an equal sum, the latest.
        self._marks: deque[tuple[int, int]] = deque()

    def observe(self, count: int, now: int) -> None:
        self.departed += max(0, self._last - count)
        self._last = count
        if self._marks and self._marks[-1][0] == self.departed + count:
            self._marks.pop()
        self._marks.append((self.departed + count, now))
        while self._marks and self._marks[0][0] <= self.departed:
            self.after = self._marks.popleft()[1]
        if len(self._marks) > MARKS:
            self._marks = deque(list(self._marks)[::2])
