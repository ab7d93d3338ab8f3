"""The three ways in which a broker does not take a message, and where messages wait that it takes in no form."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum, auto

from . import clock

__all__ = ["Fault", "Parking", "Unsendable"]


class Fault(Enum):
    """Why the broker did not take a message, and so for how long to try.

    LOST: The connection is lost, or the server takes nothing at all for now. Try until it answers.
    REFUSED: The server refuses this message now: its queue is full or missing. Try for some seconds.
    HOPELESS: The message can never be sent as it is: it cannot be encoded, or is too large. Do not try again.
    """

    LOST = auto()
    REFUSED = auto()
    HOPELESS = auto()


class Unsendable(Exception):
    """A message that cannot be encoded, or that the server refuses for good."""


class Parking:
    """Messages that keep their slots for a while, since the broker would not take them in any form."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[float, Callable[[], object]]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def park(self, wait_ms: float, give_back: Callable[[], object]) -> None:
        """Call ``give_back`` after the wait. Any thread may park."""
        self._waiting.append((clock.monotonic() + wait_ms / 1_000, give_back))

    def give_back(self, *, everything: bool = False) -> None:
        """Give back what has waited long enough. Only the consumer's thread calls it."""
        for _ in range(len(self._waiting)):
            due, give_back = self._waiting.popleft()
            if everything or due <= clock.monotonic():
                give_back()
            else:
                self._waiting.append((due, give_back))
