"""Batch the acks of all threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from ...common.forks import after_fork

__all__ = ["SharedAcks", "UnackedCounts"]


class UnackedCounts:
    """How many messages the consumer of each queue has received and not yet acknowledged."""

    def __init__(self) -> None:
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        """Start empty: a new process has no consumer."""
        #: Returns the count, by queue. The transport of the queue registers itself, until it closes.
        self.by_queue: dict[str, Callable[[], int]] = {}


class SharedAcks:
    """Sends the acks of all threads over the channel of one consumer, in batches.

    Only the connection thread may send. Each `add_callback_threadsafe` wakes the connection thread through a socket, so one
    callback serves all pending acks and writes to the server once.

    Parameters:
      connection: The connection of the consumer.
      write: Buffers the ack of a delivery tag.
      send: Writes the ack of a delivery tag and all buffered acks.
    """

    def __init__(self, connection: Any, write: Callable[[int], object], send: Callable[[int], object]) -> None:
        self._connection, self._write, self._send = connection, write, send
        self._tags: deque[int] = deque()
        #: Whether a callback is pending. The callback first clears the flag, then takes tags. A thread first adds its tag, then
        #: checks the flag. So either the callback takes the tag, or the thread adds another callback.
        self._called = False

    def put(self, tag: int) -> None:
        """Ack a message, from any thread.

        Raises:
          pika.exceptions.ConnectionWrongStateError: The connection is closed. RabbitMQ redelivers all pending messages.
        """
        self._tags.append(tag)
        if not self._called:
            self._called = True
            self._connection.add_callback_threadsafe(self._send_all)

    def send(self, tags: Iterable[int]) -> None:
        """Ack messages now, from the connection thread."""
        self._tags.extend(tags)
        self._send_all()

    def _send_all(self) -> None:
        self._called = False
        tags = self._tags
        while tags:
            tag = tags.popleft()
            # Only this thread takes tags, so the last tag is known.
            (self._write if tags else self._send)(tag)
