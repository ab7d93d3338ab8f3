"""Runs of this process that ended without an acknowledgement, because their connection was lost.

A connection is lost when a job holds the interpreter for longer than two heartbeats, when the network is partitioned, or
when the process was stopped. The broker then redelivers every unacknowledged message, often to the same process, and the
process would run each message again. (This module knows only this process. Idempotency covers runs on other workers.)

- The run has ended and its follow-up messages are published: the redelivery is acknowledged unrun, as a duplicate.
- The run has ended and its follow-up messages are not published: the redelivery publishes them and does not run.
- The run goes on, or waits for a thread: the redelivery waits for the end of the run.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from ..common.forks import after_fork
from ..delivery.decision import SUCCEEDED, Decision
from ..delivery.delivery import Delivery, EarlierRun
from ..outcomes import Outcome

if TYPE_CHECKING:
    from ..delivery.transport import Transport

__all__ = ["EndedRuns", "earlier_run_of", "is_recorded_by_store"]

#: How many runs to remember; the oldest are forgotten first.
_CAPACITY = 10_000
_COMPLETED = EarlierRun(Decision(Outcome.DUPLICATE, "completed"), None)
_STALE = EarlierRun(Decision(Outcome.DUPLICATE, "stale"), None)


def earlier_run_of(delivery: Delivery) -> EarlierRun:
    """Return the rest of an ended run: the decision, and the follow-up messages if not yet published."""
    decision = delivery.decision
    if delivery.abandoned and decision is not None:
        return EarlierRun(decision, delivery.follow_ups)
    return _COMPLETED if decision is SUCCEEDED else _STALE


def is_recorded_by_store(delivery: Delivery) -> bool:
    """Whether the store records the end of the run for all processes."""
    if delivery.claim is not None:
        return delivery.claim.keyed
    # A transactional job has given way to another run. If the other run dies, this message must run.
    return delivery.transaction is not None and not delivery.transaction.is_committed


class EndedRuns:
    """The ended runs on a broker. The key of a run is also the key of the redelivery."""

    def __init__(self) -> None:
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        """Forget everything: nothing has run in a new process."""
        self._lock = threading.Lock()
        #: The rest of each ended run, for the redelivery. Read without the lock: empty unless a connection was lost.
        self.known: OrderedDict[Hashable, EarlierRun] = OrderedDict()
        #: The transport that delivered each message in hand.
        self.in_hand: dict[Hashable, Transport] = {}
        #: For each redelivery waiting for a run: the transport, and the callback for the end of the run.
        self._waiting: dict[Hashable, tuple[Transport, Callable[[EarlierRun | None], object]]] = {}

    def remember(self, key: Hashable, earlier_run: EarlierRun | None) -> None:
        """Remember a run that ended without an acknowledgement. If ``earlier_run`` is None, the redelivery asks the store."""
        with self._lock:
            self.in_hand.pop(key, None)
            waiting = self._waiting.pop(key, None)
            if waiting is None and earlier_run is not None:
                self.known[key] = earlier_run
                while len(self.known) > _CAPACITY:
                    self.known.popitem(last=False)
        if waiting is not None:
            waiting[1](earlier_run)

    def recall(self, key: Hashable) -> EarlierRun | None:
        """Return, and forget, the rest of the ended run for a redelivery; None if the message must run."""
        with self._lock:
            return self.known.pop(key, None)

    def must_wait(self, key: Hashable, transport: Transport, on_end: Callable[[EarlierRun | None], object]) -> bool:
        """Whether a redelivery must wait because this process holds the message over a lost connection.

        ``on_end`` is then called at the end of the run, on the thread of the run.
        """
        with self._lock:
            transport_of_run, waiting = self.in_hand.get(key), self._waiting.get(key)
            if (
                transport_of_run is None
                or not transport_of_run.is_revoked()
                or (waiting is not None and not waiting[0].is_revoked())
            ):
                # Another message with the same body.
                return False
            self._waiting[key] = transport, on_end
            return True

    def forget_transport(self, transport_of_run: Transport) -> None:
        """Forget the messages of a transport after the worker has stopped: none of them begins any more."""
        with self._lock:
            for key in [key for key, one in self.in_hand.items() if one is transport_of_run]:
                del self.in_hand[key]
                self._waiting.pop(key, None)
