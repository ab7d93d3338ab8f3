"""Dramatiq's composition middleware, except that what they enqueue is part of the hand-off.

Stock enqueues the next stage, and a group's callbacks, in an after-hook, whose errors are swallowed: the message is acked
and the stage is lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dramatiq.middleware import GroupCallbacks as StockGroupCallbacks
from dramatiq.middleware import Middleware
from dramatiq.middleware import Pipelines as StockPipelines

from ..delivery import Delivery, Recorder, Send

if TYPE_CHECKING:
    from dramatiq.broker import Broker, MessageProxy

__all__ = ["GroupCallbacks", "Pipelines"]


def _hand_on(
    stock: type[Middleware], middleware: Middleware, broker: Broker, message: MessageProxy, result: Any
) -> None:
    """Have the stock middleware's own code run as a step of the hand-off, and record what it enqueues."""
    delivery: Delivery | None = getattr(message, "delivery", None)
    if delivery is None:
        stock.after_process_message(middleware, broker, message, result=result)
        return

    def step() -> list[Send]:
        recorder = Recorder(broker)
        stock.after_process_message(middleware, recorder, message, result=result)  # type: ignore[arg-type]
        return recorder.sends

    delivery.hand_on(step)


class Pipelines(StockPipelines):
    """Moves pipelines on; the stage's message is acked once the broker has accepted the next one."""

    def after_process_message(
        self, broker: Broker, message: MessageProxy, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        if exception is None and not message.failed and message.options.get("pipe_target") is not None:
            _hand_on(StockPipelines, self, broker, message, result)


class GroupCallbacks(StockGroupCallbacks):
    """Counts a group's members; a member's message is acked once the callbacks it completes were accepted."""

    def after_process_message(
        self, broker: Broker, message: MessageProxy, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        if exception is None and not message.failed and message.options.get("group_completion_callbacks"):
            _hand_on(StockGroupCallbacks, self, broker, message, result)
