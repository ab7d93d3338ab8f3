"""The transport of a delay queue on Redis: the nearest messages in hand, the rest in an index on the server."""

from __future__ import annotations

from typing import Any

import redis
from dramatiq.broker import MessageProxy
from dramatiq.errors import BrokerConnectionError

from ... import _dramatiq
from ...common.clock import now_ms
from ...common.safe_logger import SafeLogger
from ...delivery.broker_state import BrokerState
from ...delivery.delay_queue import Move
from ...delivery.outgoing import OutgoingMessage
from ...delivery.validation import is_number
from .delay_index import BATCH, DelayIndex
from .transport import RedisTransport

__all__ = ["RedisDelayTransport"]

logger = SafeLogger("dramatiq_policies.outcomes")


class RedisDelayTransport(RedisTransport):
    """Consumes a delay queue, and moves messages when due."""

    def __init__(self, state: BrokerState, inner: Any, queue_name: str, prefetch: int) -> None:
        super().__init__(state, inner, queue_name, prefetch)
        self.index = DelayIndex(inner.broker, queue_name, self.batcher.call)

    def make_room(self) -> int:
        """Move far messages to the index and take due ones from the index. Returns how many messages may be fetched."""
        window, delayed = self.window, self.delayed
        if window.taken >= window.prefetch:
            self._move_to_index(delayed.cut(window.prefetch * 3 // 4))
        for raw_id, body in self.call(self.index.fetch, super().make_room()):
            message = self._received(raw_id, body)
            if message is not None and window.take(message.options["redis_message_id"]):
                eta: Any = message.options.get("eta")
                delayed.put(_dramatiq.delay_item(eta if is_number(eta) else 0, MessageProxy(message)))
        return min(super().make_room(), BATCH)

    def _move_to_index(self, far: list[Any]) -> None:
        """Move messages to the index."""
        window, delayed = self.window, self.delayed
        due_times = {
            _dramatiq.delayed_message(item).options["redis_message_id"]: _dramatiq.eta_of(item) for item in far
        }
        try:
            self.call(self.index.add, due_times.items())
        except BrokerConnectionError:
            # If Redis has executed the command, these are no longer in our unacked set, and a move does nothing.
            for item in far:
                delayed.put(item)
            raise
        finally:
            for _ in far:
                delayed.task_done()
        for redis_id in due_times:
            window.release(redis_id)

    def idle(self, seconds: float) -> None:
        """Wait, but not beyond the next due time in hand or in the index."""
        etas = (self.index.next_check, self.delayed.next_eta())
        nearest = min(eta for eta in etas if eta is not None)
        super().idle(max(0.0, min(seconds, (nearest - now_ms()) / 1_000)))

    def has_received(self) -> bool:
        return bool(self.cache)

    def move(self, moves: list[Move]) -> None:
        """Move messages in one round trip."""
        sent = []
        for move in moves:
            outgoing = OutgoingMessage(move.moved)
            try:
                redis_id = move.message.options["redis_message_id"]
                sent.append((move, outgoing, redis_id, self.settling.command(redis_id, sends=self._encode(outgoing))))
            except Exception as error:
                move.error = error
        answers = self.call(self.batcher.answers, [command for *_, command in sent]) if sent else []
        for (move, outgoing, redis_id, _), answer in zip(sent, answers, strict=True):
            if isinstance(answer, Exception):
                move.error = answer
                continue
            move.done = True
            self.window.release(redis_id)
            if answer:
                self.broker.emit_after("enqueue", outgoing.message, None)

    def dead_letter_unmoved(self, message: MessageProxy) -> None:
        redis_id = message.options["redis_message_id"]
        self.call(self.broker.do_nack, self.source, redis_id)
        self.window.release(redis_id)

    def close(self) -> None:
        super().close()
        if self.state.stopping.is_set():
            try:
                self.index.release()
            except (redis.RedisError, OSError) as error:
                logger.warning(
                    "The worker could not return its delayed messages to queue %r; another worker recovers them: %s",
                    self.source,
                    error,
                )
