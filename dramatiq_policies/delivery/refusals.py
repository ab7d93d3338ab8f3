"""The three ways in which a broker does not take a message, and where messages wait that it takes in no form."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum, auto

from ..common import clock
from ..common.safe_logger import SafeLogger

__all__ = ["IN_A_ROW", "Distrust", "Fault", "Parking", "Unsendable"]

alerts = SafeLogger("dramatiq_policies.alerts")

#: How many bodies in a row that it cannot read a worker moves to the dead letters. Then it suspects itself.
IN_A_ROW = 10
#: For how many seconds it takes nothing then: at first, and at most.
_FIRST_PAUSE, _LAST_PAUSE = 5.0, 60.0


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


class Distrust:
    """Whether a worker that reads one body of a queue after the other as garbage should go on taking them.

    Ten in a row may be the worker's own fault: another encoder than the producers', or too low a ``max_body_bytes``. It then
    takes nothing for a pause that grows from 5 s to a minute, looks at ten messages after each, and goes on with the first
    that it can read. The others stay on the queue, behind those that it has not seen.
    """

    def __init__(self, queue: str) -> None:
        self.queue = queue
        self.count = 0
        self.pauses = 0
        self.until = 0.0

    @property
    def is_pausing(self) -> bool:
        """Whether it takes a few messages at a time, with pauses."""
        return self.count >= IN_A_ROW

    def seconds_left(self) -> float:
        """For how long it takes nothing."""
        return max(0.0, self.until - clock.monotonic()) if self.count else 0.0

    def unreadable(self, error: Exception | str) -> bool:
        """Count a body that cannot be read. Returns whether to leave it on the queue."""
        self.count += 1
        if self.count >= IN_A_ROW and not self.seconds_left():
            self.until = clock.monotonic() + min(_FIRST_PAUSE * 2 ** min(self.pauses, 10), _LAST_PAUSE)
            self.pauses += 1
        if self.count == IN_A_ROW:
            alerts.critical(
                "This worker cannot read %d messages of queue %r in a row (the last: %s). It takes no more of them, and looks "
                "at a few from time to time. Does it use the producers' encoder? Is max_body_bytes large enough?",
                IN_A_ROW,
                self.queue,
                error,
            )
        return self.count > IN_A_ROW

    def readable(self) -> None:
        """Count a body that can be read."""
        self.count = self.pauses = 0
