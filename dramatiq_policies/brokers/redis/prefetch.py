"""The places that a consumer's messages take, of those that it may prefetch."""

from __future__ import annotations

from threading import Event

__all__ = ["PrefetchWindow"]


class PrefetchWindow:
    """Which messages of a queue this process holds, and how many places they take.

    One that is done takes none any more while its ack is on its way: so there is more to do when it arrives.

    Parameters:
      held: The ids that are held; not forgotten when a connection is lost.
      prefetch: How many places there are.
    """

    def __init__(self, held: set[str], prefetch: int) -> None:
        self.held = held
        self.prefetch = prefetch
        #: The ids whose jobs are over, and whose acks are on their way or tried again.
        self._done: set[str] = set()
        #: What was held when messages were last fetched: among them may be one that has been acked since.
        self._held_before: frozenset[str] = frozenset()
        self._room = Event()

    @property
    def taken(self) -> int:
        return len(self.held) - len(self._done)

    def about_to_fetch(self) -> None:
        self._held_before = frozenset(self.held)

    def take(self, redis_id: str) -> bool:
        """Hold a message that was fetched. False if it is held already, or was when it was fetched."""
        if redis_id in self.held or redis_id in self._held_before:
            return False
        self.held.add(redis_id)
        return True

    def job_finished(self, redis_id: str) -> None:
        """Its job is over, so another may take its place."""
        self._done.add(redis_id)
        self._look_for_room()

    def release(self, redis_id: str) -> None:
        """It is held no more."""
        self.held.discard(redis_id)
        self._done.discard(redis_id)
        # One that was abandoned, or acked by somebody's own `do_ack`, was in no `job_finished`.
        self._look_for_room()

    def wait(self, seconds: float) -> None:
        """While all places are taken, wait until half of them are free."""
        self._room.clear()
        if self.taken >= self.prefetch:
            self._room.wait(seconds)

    def _look_for_room(self) -> None:
        # Looked at first, since to set it takes a lock. Whoever waits clears it, and looks for room only then.
        if not self._room.is_set() and len(self.held) - len(self._done) <= self.prefetch >> 1:
            self._room.set()
