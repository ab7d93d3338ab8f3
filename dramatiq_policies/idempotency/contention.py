"""How long duplicates wait while another message runs their key.

A single duplicate asks the store soon, then at growing intervals. Asking is as expensive as a job, so thousands of
duplicates of one key would crowd out other jobs. From 16 duplicates on, a key is contended:

- One duplicate a second asks the store. The others trust its answer.
- A due duplicate stays in the delay queue while another message is known to hold the key. Such a duplicate does not pass
  through the work queue, so no other job waits behind the duplicate.
- Once the key is free, duplicates move to the work queue at a limited rate, ahead of no more than a few other jobs.
"""

from __future__ import annotations

import random
from math import inf
from typing import TYPE_CHECKING

from ..common import clock
from ..common.clock import now_ms
from ..delivery.consumer import REDELIVERED
from .actions import SkipDuplicate, WaitForOwner

if TYPE_CHECKING:
    from dramatiq.broker import MessageProxy

__all__ = ["WAITS_FOR", "Contention"]

#: The option of a deferred message: the register of the key.
WAITS_FOR = "waits_for"
#: The first wait, in milliseconds. The wait doubles with each deferral.
_FIRST_WAIT = 1_000
_LEAST_WAIT = 20
#: From how many waiting messages on, in one process, a key is contended.
_CONTENDED_FROM = 16
#: For how long, in seconds, the store's last answer is fresh: the other messages trust the answer.
_FRESH_FOR = 1.0
#: The random share of the longest wait, so that waits do not all end at the same time.
_JITTER = 0.2
#: Random waits end at multiples of this, in milliseconds: a delay queue wakes up ten times a second, not for each message.
_GRID = 100
#: Seconds between two moves to the work queue for a free key, and for how many seconds missed moves may be caught up.
_PACE = 0.002
_BURST = 0.1
#: How many keys are remembered.
_MAX_KEYS = 1_000


class ContendedKey:
    """This process' knowledge of one key.

    Attributes:
      counting_since: When the current count began, in monotonic seconds.
      number: How many messages were counted since then.
      before: How many messages were counted in the previous window.
      asked_at: When the store was last asked, in monotonic seconds.
      owner: The store's answer; None if the key was free.
      next_move: When the next message may move from the delay queue to the work queue.
    """

    __slots__ = ("asked_at", "before", "counting_since", "next_move", "number", "owner")

    def __init__(self, now: float) -> None:
        self.counting_since = now
        self.number = 0
        self.before = 0
        self.asked_at = -inf
        self.owner: WaitForOwner | None = None
        self.next_move = 0.0

    @property
    def is_contended(self) -> bool:
        return max(self.number, self.before) >= _CONTENDED_FROM


class Contention:
    """The keys with waiting messages in this process.

    Parameters:
      lease: In milliseconds. A message waits for at most a quarter of the lease before the next look at the key.
    """

    def __init__(self, lease: int) -> None:
        self.longest_wait = lease // 4
        self.fresh_for = min(_FRESH_FOR, self.longest_wait / 1_000)
        #: Changed without a lock: a lost update only costs one more call of the store.
        self.keys: dict[str, ContendedKey] = {}
        self._random = random.Random()  # noqa: S311 - only spreads waits

    def known(self, name: str, message_id: str) -> WaitForOwner | None:
        """The store's answer to one more message of a contended key; None if the store must be asked."""
        key = self.keys.get(name)
        if key is None or not key.is_contended:
            return None
        owner = self._fresh_owner(key, clock.monotonic())
        return None if owner is None or owner.message_id == message_id else owner

    def observe(self, name: str, answer: object, *, counted: bool = False) -> None:
        """Remember an answer of the store.

        Parameters:
          counted: Whether the message has been counted in the delay queue.
        """
        if not isinstance(answer, WaitForOwner):
            key = self.keys.get(name)
            if key is not None:
                # A message that starts now owns the key: the next message asks the store.
                is_free = isinstance(answer, SkipDuplicate)
                key.asked_at, key.owner = clock.monotonic() if is_free else -inf, None
                key.next_move = min(key.next_move, key.asked_at) if is_free else key.next_move
            return
        key = self._key(name) if counted else self.count(name)
        key.asked_at, key.owner = clock.monotonic(), answer

    def count(self, name: str) -> ContendedKey:
        """Count one more waiting message of a key."""
        key, now, window = self._key(name), clock.monotonic(), self.longest_wait / 1_000
        elapsed = now - key.counting_since
        if elapsed > window:
            key.counting_since, key.before, key.number = now, key.number if elapsed <= 2 * window else 0, 0
        key.number += 1
        return key

    def wait(self, name: str, deferrals: int, owner: WaitForOwner | None) -> int:
        """Return for how many milliseconds to defer a message.

        A job that has run for long is likely to run for as long again. So the wait is at least the elapsed run time, up to
        the longest wait and the rest of the lease.

        Parameters:
          deferrals: How often the message was deferred before.
          owner: The store's answer; None if the store was not asked or is down.
        """
        wait = min(_FIRST_WAIT << min(deferrals, 20), self.longest_wait)
        if owner is None:
            return max(_LEAST_WAIT, wait)
        if owner.started_at:
            wait = max(wait, min(now_ms() - owner.started_at, self.longest_wait))
        key = self.keys.get(name)
        if key is not None and key.is_contended:
            return self._spread(owner.left)
        return max(_LEAST_WAIT, min(wait, owner.left))

    def postpone(self, message: MessageProxy) -> int | None:
        """Return for how many milliseconds a due message stays in the delay queue; None to move the message."""
        options = message.options
        name = options.get(WAITS_FOR)
        if type(name) is not str or REDELIVERED in options:
            return None
        key, now = self.count(name), clock.monotonic()
        if not key.is_contended:
            return None
        owner = self._fresh_owner(key, now)
        if owner is not None:
            return None if owner.message_id == message.message_id else self._spread(owner.left)
        if key.next_move > now:
            return round(self.fresh_for * 1_000 * self._random.uniform(0.5, 1))
        is_free = key.owner is None and now - key.asked_at <= self.fresh_for
        # While nothing is known, one message asks for all.
        key.next_move = max(key.next_move, now - _BURST) + _PACE if is_free else now + self.fresh_for
        return None

    def _key(self, name: str) -> ContendedKey:
        key = self.keys.get(name)
        if key is None:
            now = clock.monotonic()
            if len(self.keys) >= _MAX_KEYS:
                self.keys = {name: key for name, key in list(self.keys.items()) if now - key.asked_at < self.fresh_for}
            key = self.keys[name] = ContendedKey(now)
        return key

    def _fresh_owner(self, key: ContendedKey, now: float) -> WaitForOwner | None:
        """Return the holder of the key, if the store's answer is fresh enough."""
        owner, elapsed = key.owner, now - key.asked_at
        if owner is None or elapsed > self.fresh_for:
            return None
        left = owner.left - round(elapsed * 1_000)
        return WaitForOwner(left, owner.started_at, owner.message_id) if left > 0 else None

    def _spread(self, left: int) -> int:
        drawn = self._random.uniform(0, self.longest_wait * _JITTER)
        # No wait ends before the lease does; when the lease ends, the messages still come one after the other.
        wait = round(min(self.longest_wait - drawn, left + drawn))
        return max(_LEAST_WAIT, wait - (now_ms() + wait) % min(_GRID, max(1, self.longest_wait // 10)))
