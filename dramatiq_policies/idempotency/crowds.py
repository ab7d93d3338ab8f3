"""How long a message waits whose key another one holds, and what many of them cost.

A single duplicate looks again soon, then ever later. Of very many each look costs the queue as much as a job: so they look
as seldom as allowed, at random, and not all of them ask the store: while one of them has just been told that the key is
held, the others are put back without a question.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from ..common import clock
from ..delivery.history import now_ms
from .records import Defer

__all__ = ["Crowds"]

#: The shortest wait, in milliseconds; it doubles with each.
_FIRST_WAIT = 1_000
_LEAST_WAIT = 20
#: So many messages with one key that wait in one process are many.
_MANY = 16
#: For how long, in seconds, an answer of the store holds for many.
_FRESH = 1.0
#: Which share of the longest wait is drawn at random, so that many do not come at the same time.
_JITTER = 0.2
#: How many keys are remembered.
_KEYS = 1_000


class _Crowd(NamedTuple):
    """The messages with one key that were put back lately.

    Attributes:
      began: When they began to be counted, in monotonic seconds.
      number: How many there were since then.
      before: How many there were in the time before that.
      asked: When the store was asked last.
      answer: Its answer.
    """

    began: float
    number: int
    before: int
    asked: float
    answer: Defer

    @property
    def is_large(self) -> bool:
        return max(self.number, self.before) >= _MANY


class Crowds:
    """The messages that one process has put back, by key.

    Parameters:
      lease: In milliseconds; a message waits for a quarter of it at most.
    """

    def __init__(self, lease: int) -> None:
        self.at_most = lease // 4
        #: Changed without a lock: a count that is lost is counted next time.
        self.waiting: dict[str, _Crowd] = {}
        self._random = random.Random()  # noqa: S311 - it spreads waits

    def known(self, name: str, message_id: str) -> Defer | None:
        """What the store would say to one more message of many; None if it is to be asked."""
        crowd = self.waiting.get(name)
        if crowd is None or not crowd.is_large or crowd.answer.message_id == message_id:
            return None
        elapsed = clock.monotonic() - crowd.asked
        left = crowd.answer.left - round(elapsed * 1_000)
        if elapsed > _FRESH or left <= 0:
            return None
        self._count(name, crowd, crowd.asked, crowd.answer)
        return Defer(left, crowd.answer.since, crowd.answer.message_id)

    def saw(self, name: str, answer: Defer) -> None:
        """The store has said that a key is held."""
        now = clock.monotonic()
        crowd = self.waiting.get(name)
        if crowd is None:
            if len(self.waiting) >= _KEYS:
                self.waiting = {key: one for key, one in list(self.waiting.items()) if now - one.asked < _FRESH}
            crowd = _Crowd(now, 0, 0, now, answer)
        self._count(name, crowd, now, answer)

    def _count(self, name: str, crowd: _Crowd, asked: float, answer: Defer) -> None:
        now, began, number, before = clock.monotonic(), crowd.began, crowd.number, crowd.before
        window = self.at_most / 1_000
        if now - began > window:
            began, number, before = now, 0, number if now - began <= 2 * window else 0
        self.waiting[name] = _Crowd(began, number + 1, before, asked, answer)

    def wait(self, name: str, deferrals: int, answer: Defer | None) -> int:
        """For how many milliseconds a message is put back.

        A run that has lasted for long is likely to last for as long again, so nobody looks sooner than that.

        Parameters:
          deferrals: How often it was put back before.
          answer: What the store said of the key; None if it was not asked or could not be.
        """
        wait = min(_FIRST_WAIT << min(deferrals, 20), self.at_most)
        if answer is None:
            return max(_LEAST_WAIT, wait)
        if answer.since:
            wait = max(wait, min(now_ms() - answer.since, self.at_most))
        crowd = self.waiting.get(name)
        if crowd is None or not crowd.is_large:
            return max(_LEAST_WAIT, min(wait, answer.left))
        drawn = self._random.uniform(0, self.at_most * _JITTER)
        # None looks before the lease is over; when it is, they still come one after the other.
        return max(_LEAST_WAIT, round(min(self.at_most - drawn, answer.left + drawn)))
