"""Open a queue of any broker: count the messages by `reader_of`, or read the messages by `browse`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib import import_module

from dramatiq.broker import Broker

from .._dramatiq import kind_of
from ..errors import OperationError
from .browser import Item, QueueBrowser
from .queue_reader import QueueReader, QueueReading

__all__ = ["Item", "QueueBrowser", "QueueReader", "QueueReading", "browse", "reader_of"]


def reader_of(broker: Broker) -> QueueReader:
    """Return a reader of the broker's queues. The first reading connects."""
    kind = kind_of(broker)
    if kind is None:
        return QueueReader(broker)
    module = import_module(f"{__package__}.{kind}.queue_reader")
    reader: QueueReader = getattr(module, f"{kind.capitalize()}QueueReader")(broker)
    return reader


def browse(broker: Broker, queue: str, *, dead: bool) -> AbstractContextManager[QueueBrowser]:
    """Open the dead letters of a queue, or its ready messages.

    Raises:
      OperationError: The broker is unreachable or of an unknown type.
    """
    kind = kind_of(broker)
    if kind is None:
        raise OperationError(f"{type(broker).__name__} is an unknown broker type: its queues can't be read.")
    opened: AbstractContextManager[QueueBrowser] = import_module(f"{__package__}.{kind}.browser").browse(
        broker, queue, dead=dead
    )
    return opened
