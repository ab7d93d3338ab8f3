"""The prefetch window of a consumer on Redis."""

from __future__ import annotations

from threading import Event

from ...common.forks import after_fork

__all__ = ["InFlight", "PrefetchWindow"]


class InFlight:
    """The ids of the messages in this process, received and not yet acknowledged.

    Kept per queue, not per connection: Redis counts the messages as ours after a reconnect.
    """

    def __init__(self) -> None:
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        """Start empty: a new process has received no message."""
        self.by_queue: dict[str, set[str]] = {}

    def ids_of(self, queue: str) -> set[str]:
        return self.by_queue.setdefault(queue, set())


class PrefetchWindow:
    """The messages of a queue in this process, and the free places for more.

    A finished job frees its place before the ack arrives, so the consumer fetches the next messages meanwhile.

    Parameters:
      held: The ids of the messages in this process; see `InFlight`.
      prefetch: The number of places.
    """

    def __init__(self, held: set[str], prefetch: int) -> None:
        self.held = held
        self.prefetch = prefetch
        #: Ids of finished jobs whose ack is pending.
        self._done: set[str] = set()
        #: The held ids at the last fetch. The reply may repeat an id that was acked since.
        self._held_before: frozenset[str] = frozenset()
        self._room = Event()

    @property
    def taken(self) -> int:
        return len(self.held) - len(self._done)

    def about_to_fetch(self) -> None:
        self._held_before = frozenset(self.held)

    def take(self, redis_id: str) -> bool:
        """Hold a fetched message. Return False if the process holds the message already, or held the message at the fetch."""
        if redis_id in self.held or redis_id in self._held_before:
            return False
        self.held.add(redis_id)
        return True

    def job_finished(self, redis_id: str) -> None:
        """Free the place of the message; the ack is pending."""
        self._done.add(redis_id)
        self._signal_room()

    def release(self, redis_id: str) -> None:
        """Forget the message."""
        self.held.discard(redis_id)
        self._done.discard(redis_id)
        # Abandoned messages, and messages acked by a replaced `do_ack`, skip `job_finished`.
        self._signal_room()

    def wait(self, seconds: float) -> None:
        """Return if a place is free. Otherwise wait until half of the places are free."""
        self._room.clear()
        if self.taken >= self.prefetch:
            self._room.wait(seconds)

    def _signal_room(self) -> None:
        # Check first, because `set` takes a lock. The waiting thread clears the event, then checks for room.
        if not self._room.is_set() and len(self.held) - len(self._done) <= self.prefetch >> 1:
            self._room.set()
