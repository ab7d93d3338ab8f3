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
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING

from ..common.forks import after_fork
from ..delivery.decision import SUCCEEDED, Decision
from ..delivery.delivery import Delivery, EarlierRun
from ..outcomes import Outcome

if TYPE_CHECKING:
    from dramatiq.broker import MessageProxy

    from ..delivery.transport import Transport

__all__ = ["EndedRuns", "Runs", "is_keyed", "rest_of"]

#: How many runs to remember; the oldest are forgotten first.
_CAPACITY = 10_000
#: How many of the last acknowledgements may be lost with their connection. The server delivers at most the prefetch count
#: beyond the acknowledgements received.
_UNSEEN = 1_000
_COMPLETED = EarlierRun(Decision(Outcome.DUPLICATE, "completed"), None)
_STALE = EarlierRun(Decision(Outcome.DUPLICATE, "stale"), None)


def rest_of(delivery: Delivery) -> EarlierRun:
    """Return the rest of an ended run: the decision, and the follow-up messages if not yet published."""
    decision = delivery.decision
    if delivery.abandoned and decision is not None:
        return EarlierRun(decision, delivery.follow_ups)
    return _COMPLETED if decision is SUCCEEDED else _STALE


def is_keyed(delivery: Delivery) -> bool:
    """Whether the store records the end of the run for all processes."""
    return delivery.claim is not None and delivery.claim.keyed


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


class Runs:
    """The runs of messages from one RabbitMQ transport. A redelivery has the same body, byte for byte."""

    def __init__(self, ended: EndedRuns, transport: Transport) -> None:
        self._ended_runs = ended
        self._transport = transport
        #: The last acknowledged runs; the acknowledgements may be lost.
        self._acked: deque[tuple[int, EarlierRun]] = deque(maxlen=_UNSEEN)
        #: Redeliveries whose runs have ended.
        self.ready: deque[MessageProxy] = deque()

    def take(self, message: MessageProxy, body: bytes, redelivered: bool) -> bool:
        """Note a received message. Returns False if the message waits for an unfinished run."""
        key, ended = hash(body), self._ended_runs
        if redelivered:
            earlier_run = ended.recall(key)
            if earlier_run is None and ended.must_wait(key, self._transport, partial(self._on_end, message, key)):
                return False
            message.earlier_run = earlier_run  # type: ignore[attr-defined]
        ended.in_hand[key] = self._transport
        return True

    def _on_end(self, message: MessageProxy, key: int, earlier_run: EarlierRun | None) -> None:
        if self._transport.is_revoked():
            self._ended_runs.remember(key, earlier_run)
            return
        message.earlier_run = earlier_run  # type: ignore[attr-defined]
        self._ended_runs.in_hand[key] = self._transport
        self.ready.append(message)

    def acked(self, delivery: Delivery) -> None:
        """Note the run before its acknowledgement is sent."""
        key = hash(delivery.body)
        self._ended_runs.in_hand.pop(key, None)
        if not is_keyed(delivery):
            self._acked.append((key, rest_of(delivery)))

    def not_acked(self, delivery: Delivery) -> None:
        """Note an ended run that can't be acknowledged, because the connection was lost before."""
        self._ended_runs.remember(hash(delivery.body), None if is_keyed(delivery) else rest_of(delivery))

    def requeued(self, delivery: Delivery) -> None:
        """Note a message returned to the server without a run."""
        self._ended_runs.in_hand.pop(hash(delivery.body), None)

    def lost(self) -> None:
        """Note the loss of the connection, perhaps with the last acknowledgements."""
        while self._acked:
            self._ended_runs.remember(*self._acked.popleft())

    def closed(self, stopping: bool) -> None:
        """Note an orderly close, after all acknowledgements. With ``stopping``, no run begins any more."""
        self._acked.clear()
        if stopping:
            self._ended_runs.forget_transport(self._transport)
