"""Moving due messages from a delay queue to its work queue.

A batch at a time: a batch is enqueued on the work queue first, and then taken off the delay queue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dramatiq import Message
from dramatiq.broker import MessageProxy
from dramatiq.errors import ConnectionClosed

from .. import _dramatiq
from ..common.safe_logger import SafeLogger
from ..outcomes import Outcome, OutcomeEvent
from .history import now_ms
from .refusals import Fault
from .validation import is_number

if TYPE_CHECKING:
    from .consumer import PolicyConsumer
    from .delay_queue import DelayQueue

__all__ = ["Move", "attempt", "move_due"]

logger = SafeLogger("dramatiq_policies.outcomes")

#: How long a due message whose move failed waits for the next try, in milliseconds.
RETRY_AFTER = 5_000
#: How many due messages are moved at a time: as many may run twice if the process is killed in between (RabbitMQ).
BATCH = 100


@dataclass(slots=True)
class Move:
    """One due message on its way from its delay queue to its work queue.

    Parameters:
      item: The item of the `DelayQueue`.
      message: The message as delivered by the delay queue.
      moved: The message for the work queue.
      done: Whether the work queue has the message, and the delay queue no longer.
      error: Why this message could not be moved. The others of its batch are not affected.
    """

    item: Any
    message: MessageProxy
    moved: Message[Any]
    done: bool = False
    error: Exception | None = None

    @classmethod
    def of(cls, item: Any, queue_name: str) -> Move:
        message = _dramatiq.delayed_message(item)
        moved = message.copy(queue_name=queue_name)
        eta = moved.options.pop("eta", None)
        if "ready_at" not in moved.options and is_number(eta) and eta > 0:
            moved.options["ready_at"] = int(eta)
        return cls(item, message, moved)


def move_due(consumer: PolicyConsumer) -> bool:
    """Move a batch of a consumer's due messages. Returns whether more are due."""
    now, delayed, moving = now_ms(), consumer.delayed, consumer.state.moving_delayed
    due, postpone = delayed.due(now, BATCH), consumer.state.postpone
    if postpone is not None:
        due = [item for item in due if not _postponed(delayed, item, now, postpone)]
    moves = [Move.of(item, consumer.queue_name) for item in due]
    moving.on = True
    try:
        if moves:
            consumer.move(moves)
    except Exception as error:
        if consumer.fault_of(error) is Fault.LOST:
            raise ConnectionClosed(error) from None
        for move in moves:
            move.error = move.error or error
    finally:
        moving.on = False
        for move in moves:
            if not move.done and not (move.error is not None and _dead_lettered(consumer, move, move.error)):
                item = move.item if move.error is None else _dramatiq.delayed_until(move.item, now + RETRY_AFTER)
                delayed.put(item)
            delayed.task_done()
    eta = delayed.next_eta()
    return eta is not None and eta <= now


def _postponed(delayed: DelayQueue, item: Any, now: int, postpone: Callable[[MessageProxy], int | None]) -> bool:
    """Keep a due message in the delay queue, if moving it is known to be in vain."""
    message = _dramatiq.delayed_message(item)
    wait = postpone(message)
    if wait is None:
        return False
    eta = message.options["eta"] = message.options["ready_at"] = now + wait
    delayed.put(_dramatiq.delayed_until(item, eta))
    delayed.task_done()
    return True


def attempt(consumer: PolicyConsumer, move: Move, call: Callable[[Move], object]) -> None:
    """Move one message by ``call``. An error delays this message only, unless the connection is lost."""
    try:
        call(move)
        move.done = True
    except Exception as error:
        if consumer.fault_of(error) is Fault.LOST:
            raise
        move.error = error


def _dead_lettered(consumer: PolicyConsumer, move: Move, error: Exception) -> bool:
    """Whether a message that was not moved is a dead letter now: the broker will never take it as it is."""
    if consumer.fault_of(error) is Fault.HOPELESS:
        try:
            consumer.dead_letter_unmoved(move.message)
        except Exception:
            logger.exception("A message of %r that cannot be moved is not a dead letter yet.", consumer.source)
            return False
        message = move.message
        consumer.state.publish(
            OutcomeEvent(
                outcome=Outcome.DEAD,
                reason="handoff_failed",
                actor=message.actor_name,
                queue=consumer.queue_name,
                message_id=message.message_id,
                exception=error,
            ),
            message,
        )
        return True
    logger.error("A due message could not be moved out of %r; it is tried again.", consumer.source, exc_info=error)
    return False
