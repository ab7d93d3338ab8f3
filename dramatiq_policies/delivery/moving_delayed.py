"""Move due messages from a delay queue to the work queue.

Each batch is published to the work queue first, and then acknowledged on the delay queue.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dramatiq.broker import MessageProxy
from dramatiq.errors import ConnectionClosed

from .. import _dramatiq
from ..common.clock import now_ms
from ..common.safe_logger import SafeLogger
from ..outcomes import Outcome, OutcomeEvent
from .delay_queue import DelayQueue, Move
from .refusals import Fault

if TYPE_CHECKING:
    from .transport import Transport

__all__ = ["move_due"]

logger = SafeLogger("dramatiq_policies.outcomes")

#: Milliseconds until the next try to move a message.
RETRY_AFTER = 5_000
#: Messages per batch. On RabbitMQ a process killed between publish and acknowledgement leaves one batch in both queues.
BATCH = 100


def move_due(transport: Transport) -> bool:
    """Move one batch. Returns whether more messages are due."""
    now, delayed, moving = now_ms(), transport.delayed, transport.state.moving_delayed
    due, postpone = delayed.due(now, BATCH), transport.state.idempotency.postpone
    if postpone is not None:
        due = [item for item in due if not _postponed(delayed, item, now, postpone)]
    moves = [Move.of(item, transport.queue_name) for item in due]
    moving.on = True
    try:
        if moves:
            transport.move(moves)
    except Exception as error:
        if transport.fault_of(error) is Fault.LOST:
            raise ConnectionClosed(error) from None
        for move in moves:
            move.error = move.error or error
    finally:
        moving.on = False
        for move in moves:
            if not move.done and not (move.error is not None and _dead_lettered(transport, move, move.error)):
                item = move.item if move.error is None else _dramatiq.delayed_until(move.item, now + RETRY_AFTER)
                delayed.put(item)
            delayed.task_done()
    eta = delayed.next_eta()
    return eta is not None and eta <= now


def _postponed(
    delayed: DelayQueue, item: _dramatiq.DelayItem, now: int, postpone: Callable[[MessageProxy], int | None]
) -> bool:
    """Keep a due message in the delay queue, if the move is sure to fail."""
    message = _dramatiq.delayed_message(item)
    wait = postpone(message)
    if wait is None:
        return False
    eta = message.options["eta"] = message.options["ready_at"] = now + wait
    delayed.put(_dramatiq.delayed_until(item, eta))
    delayed.task_done()
    return True


def _dead_lettered(transport: Transport, move: Move, error: Exception) -> bool:
    """Dead-letter a message that the broker permanently refuses. Returns whether the dead letter was written."""
    if transport.fault_of(error) is Fault.PERMANENT:
        try:
            transport.dead_letter_unmoved(move.message)
        except Exception:
            logger.exception(
                "Message %s of %r is due, and the broker accepts the message neither in the work queue nor as a dead letter; the "
                "worker tries again.",
                move.message.message_id,
                transport.source,
            )
            return False
        message = move.message
        transport.state.outcomes.publish(
            OutcomeEvent(
                outcome=Outcome.DEAD,
                reason="handoff_failed",
                actor=message.actor_name,
                queue=transport.queue_name,
                message_id=message.message_id,
                exception=error,
            ),
            message,
        )
        return True
    logger.error(
        "Message %s is due and could not be moved out of %r; the worker tries again.",
        move.message.message_id,
        transport.source,
        exc_info=error,
    )
    return False
