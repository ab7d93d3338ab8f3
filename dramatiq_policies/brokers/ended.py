"""Runs of this process that have ended and could not be acked, since their connection was gone.

A job that holds the interpreter for longer than two heartbeats, a partition, a process that was stopped: the broker gives
all that the process holds to somebody, and very often to the same process, which would run it again and again. All this is
known to this process alone: that a message runs on another worker meanwhile is for Idempotency.

- A run has ended, and all that follows from it was accepted: its redelivery is acked unrun, as a duplicate.
- A run has ended, and what follows was not accepted: its redelivery hands that on, and does not run.
- A run goes on (or waits for its thread) when its message comes again: the redelivery waits for the end of the run.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..common.forks import after_fork
from ..delivery.decision import SUCCEEDED, Decision
from ..delivery.delivery import Carried, Delivery
from ..outcomes import Outcome

if TYPE_CHECKING:
    from dramatiq.broker import MessageProxy

__all__ = ["Ended", "Runs", "is_keyed", "left_of"]

#: How many runs are remembered; the oldest are forgotten first.
_CAPACITY = 10_000
#: How many of the last acks may be lost with their connection. RabbitMQ delivers no more than may be prefetched beyond what it
#: has seen acked.
_UNSEEN = 1_000
_COMPLETED = Carried(Decision(Outcome.DUPLICATE, "completed"), None)
_STALE = Carried(Decision(Outcome.DUPLICATE, "stale"), None)


def left_of(delivery: Delivery) -> Carried:
    """What is left to do of a run that has ended."""
    decision = delivery.decision
    if delivery.abandoned and decision is not None:
        return Carried(decision, delivery.outbox)
    return _COMPLETED if decision is SUCCEEDED else _STALE


def is_keyed(delivery: Delivery) -> bool:
    """Whether its store says how its run has ended, to all processes."""
    return delivery.claim is not None and delivery.claim.keyed


class Ended:
    """What is known of the runs of one broker, each by a key that its redelivery has too."""

    def __init__(self) -> None:
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        """In a new process nothing has run."""
        self._lock = threading.Lock()
        #: What becomes of the redeliveries. Looked at without the lock: empty but after a connection was lost.
        self.known: OrderedDict[Hashable, Carried] = OrderedDict()
        #: The consumer that delivered what this process holds.
        self.in_hand: dict[Hashable, Any] = {}
        #: To which consumer a message has come again while it runs, and what to call when that run has ended.
        self._heirs: dict[Hashable, tuple[Any, Callable[[Carried | None], object]]] = {}

    def remember(self, key: Hashable, carried: Carried | None) -> None:
        """A run has ended and could not be acked; None where its redelivery is to ask a store."""
        with self._lock:
            self.in_hand.pop(key, None)
            heir = self._heirs.pop(key, None)
            if heir is None and carried is not None:
                self.known[key] = carried
                while len(self.known) > _CAPACITY:
                    self.known.popitem(last=False)
        if heir is not None:
            heir[1](carried)

    def recall(self, key: Hashable) -> Carried | None:
        """What becomes of a message that came again, once; None if it is to run."""
        with self._lock:
            return self.known.pop(key, None)

    def waits(self, key: Hashable, consumer: Any, inherit: Callable[[Carried | None], object]) -> bool:
        """Whether this process holds a message that came again, over a connection that is gone.

        Then ``inherit`` is called once its run has ended, on the thread of that run.
        """
        with self._lock:
            holder, heir = self.in_hand.get(key), self._heirs.get(key)
            if holder is None or not holder.is_revoked() or (heir is not None and not heir[0].is_revoked()):
                # Or it is another message, with the same text.
                return False
            self._heirs[key] = consumer, inherit
            return True

    def given_up(self, holder: Any) -> None:
        """Nothing that a consumer has delivered begins any more: its worker has stopped."""
        with self._lock:
            for key in [key for key, one in self.in_hand.items() if one is holder]:
                del self.in_hand[key]
                self._heirs.pop(key, None)


class Runs:
    """The runs of what one consumer on RabbitMQ has delivered. A redelivery has the same body, byte for byte."""

    def __init__(self, ended: Ended, consumer: Any) -> None:
        self._ended = ended
        self._consumer = consumer
        #: Those whose acks were sent last.
        self._acked: deque[tuple[int, Carried]] = deque(maxlen=_UNSEEN)
        #: What came again, and whose run has ended meanwhile.
        self.inherited: deque[MessageProxy] = deque()

    def take(self, message: MessageProxy, body: bytes, redelivered: bool) -> bool:
        """Take note of a message that was received. False if it waits for a run that goes on."""
        key, ended = hash(body), self._ended
        if redelivered:
            carried = ended.recall(key)
            if carried is None and ended.waits(key, self._consumer, partial(self._inherit, message, key)):
                return False
            message.carried = carried  # type: ignore[attr-defined]
        ended.in_hand[key] = self._consumer
        return True

    def _inherit(self, message: MessageProxy, key: int, carried: Carried | None) -> None:
        if self._consumer.is_revoked():
            self._ended.remember(key, carried)
            return
        message.carried = carried  # type: ignore[attr-defined]
        self._ended.in_hand[key] = self._consumer
        self.inherited.append(message)

    def acked(self, delivery: Delivery) -> None:
        """Its ack is about to be sent."""
        key = hash(delivery.body)
        self._ended.in_hand.pop(key, None)
        if not is_keyed(delivery):
            self._acked.append((key, left_of(delivery)))

    def not_acked(self, delivery: Delivery) -> None:
        """It has ended, and the connection is gone."""
        self._ended.remember(hash(delivery.body), None if is_keyed(delivery) else left_of(delivery))

    def put_back(self, delivery: Delivery) -> None:
        """It was not begun, and is the server's."""
        self._ended.in_hand.pop(hash(delivery.body), None)

    def lost(self) -> None:
        """The connection is gone, and the last acks with it, as far as is known."""
        while self._acked:
            self._ended.remember(*self._acked.popleft())

    def closed(self, stopping: bool) -> None:
        """The connection was closed in order: all acks have been sent. With ``stopping`` nothing begins any more."""
        self._acked.clear()
        if stopping:
            self._ended.given_up(self._consumer)
