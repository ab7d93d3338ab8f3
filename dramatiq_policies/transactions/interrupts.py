"""The interrupts of a transactional job: its statements may be cut short, also if the job handles the interrupt."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dramatiq.middleware import Shutdown

from ..errors import TimeoutExceeded
from ..interrupts import coroutines
from ..interrupts.slots import noop

if TYPE_CHECKING:
    from ..delivery.delivery import Delivery
    from ..interrupts import Runner

__all__ = ["Interrupts", "watch_interrupts"]


def watch_interrupts(delivery: Delivery) -> Interrupts:
    """Record the interrupts of a delivery's job: replaces the job's runner."""
    run, fn, args, kwargs = delivery.job
    interrupts = Interrupts(delivery, run)
    delivery.job = (interrupts.run, fn, args, kwargs)
    return interrupts


class Interrupts:
    """The interrupts of one job, also interrupts that the job has handled.

    Parameters:
      delivery: The delivery.
      runner: Runs the job.

    Attributes:
      seen: Whether the job was interrupted.
    """

    def __init__(self, delivery: Delivery, runner: Runner) -> None:
        self.seen = False
        self._delivery = delivery
        self._runner = runner

    def run(self, fn: Any, args: Any, kwargs: Any, *, after_interrupt: Callable[[], object] = noop, **more: Any) -> Any:
        """Run a job, and record its interrupts."""

        def note() -> None:
            self.seen = True
            after_interrupt()

        if coroutines.is_async(fn):
            more["on_cancel"] = self._note_cancellation
        return self._runner(fn, args, kwargs, after_interrupt=note, **more)

    def _note_cancellation(self) -> None:
        self.seen = True

    def raise_swallowed(self) -> None:
        """Raise the interrupt of a job that has returned nonetheless: its statements may be cut short."""
        if not self.seen:
            return
        delivery = self._delivery
        if delivery.timeout_ms is not None and delivery.elapsed_ms() >= delivery.timeout_ms:
            raise TimeoutExceeded
        raise Shutdown
