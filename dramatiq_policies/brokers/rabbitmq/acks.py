"""Acks that share their way to RabbitMQ."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["SharedAcks"]


class SharedAcks:
    """Sends the acks of all threads over one consumer's channel, as many at a time as there are.

    Only the thread of the connection may send, and whoever asks for a call on that thread wakes it through a socket. So
    one call is asked for what all threads have put here until it comes, and writes to the server once.

    Parameters:
      connection: The consumer's.
      write, send: Ack by a delivery tag; what ``write`` has written may wait for the next ``send``.
    """

    def __init__(self, connection: Any, write: Callable[[int], object], send: Callable[[int], object]) -> None:
        self._connection, self._write, self._send = connection, write, send
        self._tags: deque[int] = deque()
        #: Whether a call is on its way. The call unsets it, and then takes tags; a thread puts a tag here, and then looks.
        #: So either the call takes that tag, or its thread asks for another call.
        self._called = False

    def put(self, tag: int) -> None:
        """Have a message acked, from any thread.

        Raises:
          pika.exceptions.ConnectionWrongStateError: The connection is closed. Its server gives the messages out again, also
            those whose threads saw that a call was on its way.
        """
        self._tags.append(tag)
        if not self._called:
            self._called = True
            self._connection.add_callback_threadsafe(self._send_all)

    def send(self, tags: Iterable[int]) -> None:
        """Have messages acked now, from the thread of the connection."""
        self._tags.extend(tags)
        self._send_all()

    def _send_all(self) -> None:
        self._called = False
        tags = self._tags
        while tags:
            tag = tags.popleft()
            # Nobody else takes any: there is a last one.
            (self._write if tags else self._send)(tag)
