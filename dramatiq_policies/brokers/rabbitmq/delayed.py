"""The transport of a delay queue on RabbitMQ.

The server delivers the whole delay queue, up to 65,535 messages. The transport keeps the nearest messages in full. For the
rest only the delivery tag and the due time are kept; shortly before the due time the message is returned, and the server
delivers the message again. So near messages do not wait behind far ones, nothing is published, and the server still has every
message if the process dies.

Due messages are moved in batches: published with pipelined confirms, then acknowledged at once on the thread that owns the
consumer's connection. A process killed in between leaves at most one batch in both queues.
"""

from __future__ import annotations

from heapq import heappop, heappush
from time import monotonic
from typing import Any

from dramatiq import Message
from dramatiq.broker import MessageProxy
from dramatiq.errors import ConnectionClosed

from ... import _dramatiq
from ...common.clock import now_ms
from ...common.connections import discard
from ...delivery.broker_state import BrokerState
from ...delivery.delay_queue import Move
from ...delivery.outgoing import OutgoingMessage
from ...delivery.refusals import Unsendable
from .confirms import PipelinedConfirms
from .publisher import LOST
from .transport import RabbitmqTransport

__all__ = ["RabbitmqDelayTransport"]

#: Milliseconds before the due time at which a message is returned for another delivery.
_RETURN_BEFORE_DUE = 5_000
#: Batch size for messages published anew.
_REPUBLISH_BATCH = 100
#: The prefetch count of the delay queue: the maximum of AMQP. 0, "no limit", means 2,000 to a quorum queue.
_WINDOW = 65_535
#: The least number of messages to keep in full.
_FEWEST = 100
#: Seconds between two heartbeats on this thread's connection for publishing.
_SERVE_EVERY = 5.0
#: Seconds that a stopping worker waits for confirms.
_CONFIRM_WHILE_STOPPING = 5.0


class RabbitmqDelayTransport(RabbitmqTransport):
    """Consumes a delay queue, and moves messages when due.

    Parameters:
      state, inner, queue_name: See `Transport`.
      prefetch: How many messages to keep in full, at least 100.
    """

    def __init__(self, state: BrokerState, inner: Any, queue_name: str, prefetch: int) -> None:
        super().__init__(state, inner, queue_name, prefetch)
        self.limit = max(prefetch, _FEWEST)
        #: Due time and tag of each delivered message that is not kept in full, the nearest first.
        self.far: list[tuple[float, int]] = []
        #: How many returned messages have not been delivered again.
        self.returned = 0
        self.confirms: PipelinedConfirms | None = None
        #: Messages to publish anew, with their tags: see `republish`.
        self.to_republish: list[tuple[int, OutgoingMessage]] = []
        self.served = monotonic()
        # Dramatiq's consumer begins to consume at the first look at a message, so this limit is in force by then.
        self.channel.call(inner.channel.basic_qos, 0, _WINDOW)

    def unacked_count(self) -> int:
        return super().unacked_count() + len(self.far)

    def has_received(self) -> bool:
        return bool(self.inner.channel.get_waiting_message_count() > 0)

    def take(self) -> MessageProxy | None:
        if self.to_republish and (len(self.to_republish) >= _REPUBLISH_BATCH or not self.has_received()):
            self._republish_batch()
        if not self.has_received():
            self._serve_publishing()
            self._return_near()
            wait = self._seconds_to_wait()
            if wait is not None:
                self.channel.serve(wait)
                if not self.has_received():
                    # Other workers have taken the returned messages.
                    self.returned = 0 if wait > 0.1 else self.returned
                    return None
        if len(self.delayed.queue) >= self.limit:
            self._forget_far()
        message = super().take()
        if message is None:
            self.returned = 0
            return None
        message.body = None  # type: ignore[attr-defined]
        if self.returned and message.redelivered:
            self.returned -= 1
        return message

    def republish(self, tag: int, message: Message[Any]) -> bool:
        outgoing = OutgoingMessage(message)
        try:
            outgoing.encoded = self.encoded(message)
        except Unsendable:
            return False
        # In batches: after a restart this may be the whole delay queue.
        self.to_republish.append((tag, outgoing))
        return True

    def _republish_batch(self) -> None:
        renewed, self.to_republish = self.to_republish, []
        accepted = self._publish_all(self.source, [outgoing for _, outgoing in renewed])
        self.channel.call(self.acks.send, [tag for number, (tag, _) in enumerate(renewed) if number in accepted])
        for number, (tag, _) in enumerate(renewed):
            if number not in accepted:
                self.channel.nack(tag)

    def _forget_far(self) -> None:
        """Reduce the farthest messages to tag and due time."""
        for item in self.delayed.cut(self.limit * 3 // 4):
            tag = _dramatiq.take_rabbitmq_tag(self.inner, _dramatiq.delayed_message(item))
            if tag is not None:
                heappush(self.far, (_dramatiq.eta_of(item), tag))
            self.delayed.task_done()

    def _return_near(self) -> None:
        """Return far messages that are due soon, as far as room is left."""
        room, until = self._room(), now_ms() + _RETURN_BEFORE_DUE
        while room > 0 and self.far and self.far[0][0] <= until:
            self.channel.call(self.inner.channel.basic_nack, heappop(self.far)[1])
            self.returned += 1
            room -= 1

    def _room(self) -> int:
        # Below the mark of `_forget_far`, so that a message does not go back and forth.
        return self.limit // 2 - len(self.delayed.queue) - self.returned

    def _seconds_to_wait(self) -> float | None:
        """Seconds until a message is due; None if Dramatiq's consumer would return earlier."""
        eta = self.delayed.next_eta()
        if self.far and self._room() > 0:
            nearest = self.far[0][0] - _RETURN_BEFORE_DUE
            eta = nearest if eta is None else min(eta, nearest)
        wait = None if eta is None else (eta - now_ms()) / 1_000
        return None if wait is None or wait > 1 else max(0.0, wait)

    def _serve_publishing(self) -> None:
        """Serve this thread's connection for publishing. Drop a lost connection."""
        now = monotonic()
        if now - self.served < _SERVE_EVERY:
            return
        self.served = now
        connection = getattr(self.broker.state, "connection", None)
        if connection is not None:
            try:
                connection.process_data_events(0)
            except (*LOST, OSError):
                self._stop_publishing()

    def _stop_publishing(self) -> None:
        self.confirms = None
        discard(_dramatiq.take_rabbitmq_connection(self.broker))

    def move(self, moves: list[Move]) -> None:
        prepared = []
        for move in moves:
            outgoing = OutgoingMessage(move.moved)
            try:
                self.publisher.prepare(outgoing)
            except Exception as error:
                move.error = error
            else:
                prepared.append((move, outgoing))
        accepted = self._publish_all(self.queue_name, [outgoing for _, outgoing in prepared])
        done = [(move, outgoing) for number, (move, outgoing) in enumerate(prepared) if number in accepted]
        tags = [_dramatiq.take_rabbitmq_tag(self.inner, move.message) for move, _ in done]
        self.channel.call(self.acks.send, [tag for tag in tags if tag is not None])
        for move, outgoing in done:
            move.done = True
            self.broker.emit_after("enqueue", outgoing.message, None)
        self.channel.serve(0)
        if self.state.stopping.is_set() and len(accepted) < len(prepared):
            # Another try may take as long. The server redelivers the messages.
            self._stop_publishing()
            raise ConnectionClosed("RabbitMQ did not confirm before the worker stopped")
        for number, (move, outgoing) in enumerate(prepared):
            if number not in accepted:
                # Singly, with a new declare and a new connection: an error delays only this message.
                self.try_move(move, lambda move, outgoing=outgoing: self._move_single(move, outgoing))  # type: ignore[misc]

    def _move_single(self, move: Move, outgoing: OutgoingMessage) -> None:
        self.publisher.enqueue(outgoing)
        self.send_ack(move.message)

    def _publish_all(self, queue: str, messages: list[OutgoingMessage]) -> set[int]:
        """Publish to a queue, confirmed. Returns the indexes of the accepted messages."""
        broker = self.broker
        try:
            broker.declare_queue(self.queue_name, ensure=True)
            confirms = self.confirms
            if confirms is None or confirms.connection is not broker.connection or not confirms.channel.is_open:
                confirms = self.confirms = PipelinedConfirms(broker.connection)
            confirms.write(
                (queue, outgoing.encoded, outgoing.message.options.get("broker_priority")) for outgoing in messages
            )
        except (*LOST, OSError, ConnectionClosed):
            self._stop_publishing()
            return set()
        began = monotonic()
        while confirms.waiting and confirms.channel.is_open:
            try:
                confirms.connection.process_data_events(0.2)
            except (*LOST, OSError):
                self._stop_publishing()
                break
            if confirms.waiting:
                # Send heartbeats on the consumer's connection meanwhile.
                self.channel.serve(0)
                if self.state.stopping.is_set() and monotonic() - began > _CONFIRM_WHILE_STOPPING:
                    break
        return confirms.accepted
