"""Interrupt jobs when their worker shuts down."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dramatiq.middleware import Middleware
from dramatiq.middleware import ShutdownNotifications as _ShutdownNotifications

from ..delivery.consumer import quiet
from ..interrupts import shutdown, supported

if TYPE_CHECKING:
    from dramatiq import Worker
    from dramatiq.broker import Broker

__all__ = ["ShutdownNotifications"]


class ShutdownNotifications(_ShutdownNotifications):
    """Dramatiq's ``ShutdownNotifications``, limited to jobs: no hook and no other message is interrupted.

    `install` puts it in place of Dramatiq's. The message of an interrupted job goes back to its queue at once and uses up no
    attempt. The notification goes to the jobs of all workers in this process, and these workers start no other job.

    Parameters:
      notify_shutdown: Whether to interrupt jobs whose message and actor do not set ``notify_shutdown``. Default False.
    """

    # The executor asks `BrokerState.interrupted_by_shutdown` for each job.
    before_process_message = Middleware.before_process_message
    after_process_message = Middleware.after_process_message
    after_skip_message = Middleware.after_skip_message  # type: ignore[assignment]

    def after_process_boot(self, broker: Broker) -> None:
        supported()

    def before_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        quiet(worker)
        shutdown()
        self.logger.debug("Sent shutdown notification to worker threads.")
