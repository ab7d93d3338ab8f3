"""The state of one queue in this process."""

from __future__ import annotations

from .delay_queue import DelayQueue
from .refusals import DeadLetterRefusal, Parking, UnreadableBreaker

__all__ = ["QueueState"]


class QueueState:
    """The shared state of the transports of a queue, kept after a reconnect.

    Attributes:
      delayed: The delayed messages in hand; see `Transport.redelivers_on_reconnect`.
      parked: The messages that keep their slots, because the broker accepts them in no form. As ``delayed``.
      breaker: Counts unreadable bodies in a row, and pauses after too many.
      dead_letters: Whether the broker currently refuses the dead letters of this queue.
    """

    __slots__ = ("breaker", "dead_letters", "delayed", "parked")

    def __init__(self, name: str) -> None:
        self.delayed = DelayQueue()
        self.parked = Parking()
        self.breaker = UnreadableBreaker(name)
        self.dead_letters = DeadLetterRefusal()
