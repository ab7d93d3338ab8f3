"""Why a broker does not accept a message, and where messages wait that the broker accepts in no form."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from enum import Enum, auto

from ..common import clock
from ..common.safe_logger import SafeLogger

__all__ = ["IN_A_ROW", "DeadLetterRefusal", "Fault", "Parking", "UnreadableBreaker", "Unsendable"]

alerts = SafeLogger("dramatiq_policies.alerts")

#: After this many unreadable bodies in a row a worker suspects its own configuration and stops taking messages.
IN_A_ROW = 10
#: Length of the first pause and of the longest one, in seconds.
_FIRST_PAUSE, _LAST_PAUSE = 5.0, 60.0


class Fault(Enum):
    """Why the broker did not accept a message. The reason decides how long to try again.

    LOST: The connection is lost, or the server accepts nothing for now. Try until the server answers.
    REFUSED: The server refuses this message: the queue is full or missing. Try for some seconds.
    PERMANENT: The message can't be encoded, or is too large. Do not try again.
    """

    LOST = auto()
    REFUSED = auto()
    PERMANENT = auto()


class Unsendable(Exception):
    """A message can't be encoded, or the server refuses the message permanently."""


class Parking:
    """Messages that keep their slots for a while, because the broker accepts them in no form."""

    def __init__(self) -> None:
        #: When each wait is over, and the call that returns the message. Read for every message, so no method.
        self.waiting: deque[tuple[float, Callable[[], object]]] = deque()

    def __len__(self) -> int:
        return len(self.waiting)

    def park(self, wait_ms: float, return_to_queue: Callable[[], object]) -> None:
        """Call ``return_to_queue`` after the wait. Any thread may park."""
        self.waiting.append((clock.monotonic() + wait_ms / 1_000, return_to_queue))

    def return_due(self, *, everything: bool = False) -> None:
        """Return messages whose wait is over. Only the consumer's thread calls this."""
        for _ in range(len(self.waiting)):
            due, return_to_queue = self.waiting.popleft()
            if everything or due <= clock.monotonic():
                return_to_queue()
            else:
                self.waiting.append((due, return_to_queue))


class DeadLetterRefusal:
    """Whether the broker currently refuses the dead letters of a queue. Any thread may call."""

    def __init__(self) -> None:
        self.active = False
        self._lock = threading.Lock()

    def begin(self) -> bool:
        """Note a refusal. Returns whether this is the first since the last `end`."""
        with self._lock:
            is_first, self.active = not self.active, True
        return is_first

    def end(self) -> bool:
        """Note an accepted dead letter. Returns whether earlier dead letters were refused."""
        if not self.active:
            return False
        with self._lock:
            was_active, self.active = self.active, False
        return was_active


class UnreadableBreaker:
    """Decides whether a worker goes on taking messages of a queue after unreadable bodies.

    Ten unreadable bodies in a row may be the worker's own fault: another encoder than the producers', or a low
    ``max_body_bytes``. The worker then pauses (5 s at first, a minute at most), tries ten messages after each pause, and goes
    on after the first readable one. The unreadable messages stay on the queue, behind the rest.
    """

    def __init__(self, queue: str) -> None:
        self.queue = queue
        self.count = 0
        self.pauses = 0
        self.until = 0.0

    @property
    def is_pausing(self) -> bool:
        """Whether the worker takes only a few messages after each pause."""
        return self.count >= IN_A_ROW

    def seconds_left(self) -> float:
        """Seconds until the end of the pause; 0.0 outside of one."""
        return max(0.0, self.until - clock.monotonic()) if self.count else 0.0

    def unreadable(self, error: Exception | str) -> bool:
        """Count an unreadable body. Returns whether to leave the body on the queue."""
        self.count += 1
        if self.count >= IN_A_ROW and not self.seconds_left():
            self.until = clock.monotonic() + min(_FIRST_PAUSE * 2 ** min(self.pauses, 10), _LAST_PAUSE)
            self.pauses += 1
        if self.count == IN_A_ROW:
            alerts.critical(
                "This worker could not read %d messages in a row of queue %r (the last: %s). The worker "
                "pauses the queue and tries a few messages from time to time. Does the worker use the "
                "encoder of the producers? Is max_body_bytes large enough?",
                IN_A_ROW,
                self.queue,
                error,
            )
        return self.count > IN_A_ROW

    def readable(self) -> None:
        """Forget earlier unreadable bodies: this one was readable."""
        self.count = self.pauses = 0
