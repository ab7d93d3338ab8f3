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
from ..delivery.delivery import Carried, Delivery
from ..outcomes import Outcome

if TYPE_CHECKING:
    from dramatiq.broker import MessageProxy

    from ..delivery.transport import Transport

__all__ = ["Ended", "Runs", "is_keyed", "left_of"]

#: How many runs to remember; the oldest are forgotten first.
_CAPACITY = 10_000
#: How many of the last acknowledgements may be lost with their connection. The server delivers at most the prefetch count
#: beyond the acknowledgements received.
_UNSEEN = 1_000
_COMPLETED = Carried(Decision(Outcome.DUPLICATE, "completed"), None)
_STALE = Carried(Decision(Outcome.DUPLICATE, "stale"), None)


def left_of(delivery: Delivery) -> Carried:
    """Return the rest of an ended run: the decision, and the outbox if not yet published."""
    decision = delivery.decision
    if delivery.abandoned and decision is not None:
        return Carried(decision, delivery.outbox)
    return _COMPLETED if decision is SUCCEEDED else _STALE


def is_keyed(delivery: Delivery) -> bool:
    """Whether the store records the end of the run for all processes."""
    return delivery.claim is not None and delivery.claim.keyed


class Ended:
    """The ended runs on a broker. The key of a run is also the key of the redelivery."""

    def __init__(self) -> None:
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        """Forget everything: nothing has run in a new process."""
        self._lock = threading.Lock()
        #: The rest of each ended run, for the redelivery. Read without the lock: empty unless a connection was lost.
        self.known: OrderedDict[Hashable, Carried] = OrderedDict()
        #: The transport that delivered each message in hand.
        self.in_hand: dict[Hashable, Transport] = {}
        #: For each redelivery waiting for a run: the transport, and the callback for the end of the run.
        self._heirs: dict[Hashable, tuple[Transport, Callable[[Carried | None], object]]] = {}

    def remember(self, key: Hashable, carried: Carried | None) -> None:
        """Remember a run that ended without an acknowledgement. If ``carried`` is None, the redelivery asks the store."""
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
        """Return, and forget, the rest of the ended run for a redelivery; None if the message must run."""
        with self._lock:
            return self.known.pop(key, None)

    def waits(self, key: Hashable, transport: Transport, inherit: Callable[[Carried | None], object]) -> bool:
        """Whether a redelivery must wait because this process holds the message over a lost connection.

        ``inherit`` is then called at the end of the run, on the thread of the run.
        """
        with self._lock:
            holder, heir = self.in_hand.get(key), self._heirs.get(key)
            if holder is None or not holder.is_revoked() or (heir is not None and not heir[0].is_revoked()):
                # Another message with the same body.
                return False
            self._heirs[key] = transport, inherit
            return True

    def given_up(self, holder: Transport) -> None:
        """Forget the messages of a transport after the worker has stopped: none of them begins any more."""
        with self._lock:
            for key in [key for key, one in self.in_hand.items() if one is holder]:
                del self.in_hand[key]
                self._heirs.pop(key, None)


class Runs:
    """The runs of messages from one RabbitMQ transport. A redelivery has the same body, byte for byte."""

    def __init__(self, ended: Ended, transport: Transport) -> None:
        self._ended = ended
        self._transport = transport
        #: The last acknowledged runs; the acknowledgements may be lost.
        self._acked: deque[tuple[int, Carried]] = deque(maxlen=_UNSEEN)
        #: Redeliveries whose runs have ended.
        self.inherited: deque[MessageProxy] = deque()

    def take(self, message: MessageProxy, body: bytes, redelivered: bool) -> bool:
        """Note a received message. Returns False if the message waits for an unfinished run."""
        key, ended = hash(body), self._ended
        if redelivered:
            carried = ended.recall(key)
            if carried is None and ended.waits(key, self._transport, partial(self._inherit, message, key)):
                return False
            message.carried = carried  # type: ignore[attr-defined]
        ended.in_hand[key] = self._transport
        return True

    def _inherit(self, message: MessageProxy, key: int, carried: Carried | None) -> None:
        if self._transport.is_revoked():
            self._ended.remember(key, carried)
            return
        message.carried = carried  # type: ignore[attr-defined]
        self._ended.in_hand[key] = self._transport
        self.inherited.append(message)

    def acked(self, delivery: Delivery) -> None:
        """Note the run before its acknowledgement is sent."""
        key = hash(delivery.body)
        self._ended.in_hand.pop(key, None)
        if not is_keyed(delivery):
            self._acked.append((key, left_of(delivery)))

    def not_acked(self, delivery: Delivery) -> None:
        """Note an ended run that can't be acknowledged, because the connection was lost before."""
        self._ended.remember(hash(delivery.body), None if is_keyed(delivery) else left_of(delivery))

    def put_back(self, delivery: Delivery) -> None:
        """Note a message returned to the server without a run."""
        self._ended.in_hand.pop(hash(delivery.body), None)

    def lost(self) -> None:
        """Note the loss of the connection, perhaps with the last acknowledgements."""
        while self._acked:
            self._ended.remember(*self._acked.popleft())

    def closed(self, stopping: bool) -> None:
        """Note an orderly close, after all acknowledgements. With ``stopping``, no run begins any more."""
        self._acked.clear()
        if stopping:
            self._ended.given_up(self._transport)
