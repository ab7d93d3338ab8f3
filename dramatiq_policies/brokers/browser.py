"""Messages that lie somewhere, looked through one by one: the crash-safe mover behind replay, purge and move.

The contract of every pile, in words:

- Looked at in order, no more than were there at the beginning, in constant memory.
- ``send`` and ``drop`` act on the item that was yielded last. Interrupted at any moment, by an exception or a SIGKILL, a
  message that was being sent lies in one of the two places. On Redis it is one step; on RabbitMQ it may then lie in
  both, never in neither.
- What was neither sent nor dropped is afterwards where it was, in its order.
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
    """One message of a pile.

    Attributes:
      body: Its bytes.
      at_ms: Since when it lies there, in ms since the epoch, where the storage knows.
      place: Where the storage keeps it.
    """

    body: bytes
    at_ms: int | None
    place: Any


class QueueBrowser(Protocol):
    """See the module's docstring."""

    def __len__(self) -> int:
        """How many there were at the beginning."""

    def __iter__(self) -> Iterator[Item]: ...

    def read_all(self) -> Iterator[Item]:
        """As iterating, for whoever neither sends nor drops."""

    def send(self, item: Item, message: Message[Any]) -> bool:
        """Put a message on its queue, and take the item off the pile; False if somebody else has taken it meanwhile."""

    def drop(self, item: Item) -> bool:
        """Take the item off the pile; False if somebody else has."""

    def wait(self, seconds: float) -> None:
        """Wait, and keep the connection alive."""
