"""Tell a redelivery from a new message: a redelivery has the same body, byte for byte, as a run of this process."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from dramatiq.broker import MessageProxy

from ...delivery.delivery import Delivery, EarlierRun
from ..ended_runs import EndedRuns, earlier_run_of, is_recorded_by_store

if TYPE_CHECKING:
    from ...delivery.transport import Transport

__all__ = ["Redeliveries"]

#: How many of the last acknowledgements may be lost with their connection. The server delivers at most the prefetch count
#: beyond the acknowledgements received.
_MAX_UNCONFIRMED_ACKS = 1_000


class Redeliveries:
    """The redeliveries to one transport, and the runs of the transport's messages.

    Parameters:
      ended: The ended runs of the broker.
      transport: The transport.
    """

    def __init__(self, ended: EndedRuns, transport: Transport) -> None:
        self._ended_runs = ended
        self._transport = transport
        #: The last acknowledged runs; the acknowledgements may be lost.
        self._acked: deque[tuple[int, EarlierRun]] = deque(maxlen=_MAX_UNCONFIRMED_ACKS)
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
        if not is_recorded_by_store(delivery):
            self._acked.append((key, earlier_run_of(delivery)))

    def not_acked(self, delivery: Delivery) -> None:
        """Note an ended run that can't be acknowledged, because the connection was lost before."""
        self._ended_runs.remember(
            hash(delivery.body), None if is_recorded_by_store(delivery) else earlier_run_of(delivery)
        )

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
