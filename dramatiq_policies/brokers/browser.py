"""Browse and move messages one by one: the crash-safe base of replay, purge and move.

The contract of every browser:

- Yields messages in order, at most as many as on opening, in constant memory.
- ``send`` and ``drop`` act on the last yielded item. An exception or a SIGKILL at any moment loses no message. On Redis, ``send``
  is one atomic step. On RabbitMQ, a crash may leave the message in both queues, never in neither.
- Other messages keep their place and order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from dramatiq import Message

__all__ = ["Item", "QueueBrowser"]


@dataclass(frozen=True, slots=True)
class Item:
    """One message.

    Attributes:
      body: The encoded message.
      at_ms: The time of arrival in ms since the epoch, or None if the storage does not know.
      place: The address in the storage.
    """

    body: bytes
    at_ms: int | None
    place: Any


class QueueBrowser(Protocol):
    """A view of one queue. The module has the contract."""

    def __len__(self) -> int:
        """Return the number of messages on opening."""

    def __iter__(self) -> Iterator[Item]: ...

    def read_all(self) -> Iterator[Item]:
        """Iterate for reading only: faster, without `send` and `drop`."""

    def send(self, item: Item, message: Message[Any]) -> bool:
        """Enqueue ``message`` and remove the item. Return False if another process has taken the item."""

    def drop(self, item: Item) -> bool:
        """Remove the item. Return False if another process has taken the item."""

    def wait(self, seconds: float) -> None:
        """Wait, and keep the connection alive."""
