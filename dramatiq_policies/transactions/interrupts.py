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

__all__ = ["Interrupts"]


class Interrupts:
    """Records the interrupts of a job, also interrupts that the job has handled."""

    def __init__(self, delivery: Delivery) -> None:
        self.seen = False
        self._delivery = delivery
        self._call: Runner
        self._call, fn, args, kwargs = delivery.job
        delivery.job = (self._run, fn, args, kwargs)

    def _run(
        self, fn: Any, args: Any, kwargs: Any, *, after_interrupt: Callable[[], object] = noop, **more: Any
    ) -> Any:
        def note() -> None:
            self.seen = True
            after_interrupt()

        if coroutines.is_async(fn):
            more["on_cancel"] = self._note_cancellation
        return self._call(fn, args, kwargs, after_interrupt=note, **more)

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
