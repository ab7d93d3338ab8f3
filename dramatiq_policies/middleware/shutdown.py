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

    `install` replaces Dramatiq's class. The message of an interrupted job returns to the queue at once and uses no
    attempt. The notification goes to the jobs of all workers in this process, and these workers start no other job.

    Parameters:
      notify_shutdown: Whether to interrupt jobs without ``notify_shutdown`` on message and actor. Default False.
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
