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
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from .._dramatiq import kind_of
from ..errors import OperationError

if TYPE_CHECKING:
    from dramatiq import Message
    from dramatiq.broker import Broker

__all__ = ["Item", "QueueBrowser", "open_browser"]


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


def open_browser(broker: Broker, queue: str, *, dead: bool) -> AbstractContextManager[QueueBrowser]:
    """The dead letters of a queue, or the messages that are ready in it.

    Raises:
      OperationError: If the broker can't be reached, or its storage is not known.
    """
    kind = kind_of(broker)
    if kind is None:
        raise OperationError(f"How a {type(broker).__name__} stores messages is not known.")
    opening = import_module(f"{__package__}.{kind}.browser").open_browser
    return opening(broker, queue, dead=dead)  # type: ignore[no-any-return]
