"""Telling jobs that their worker shuts down."""

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
    """Dramatiq's ``ShutdownNotifications``, except that it interrupts jobs and nothing else.

    Its message is put back at once and uses up no attempt. The worker begins no further job after the notification, which goes
    to the jobs of every worker in this process.

    Parameters:
      notify_shutdown: Whether jobs are interrupted, where neither message nor actor says so. Not by default.
    """

    # Whether the job is interrupted is for the wrapper of the actor's function to ask (`should_notify`).
    before_process_message = Middleware.before_process_message
    after_process_message = Middleware.after_process_message
    after_skip_message = Middleware.after_skip_message  # type: ignore[assignment]

    def after_process_boot(self, broker: Broker) -> None:
        supported()

    def before_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        quiet(worker)
        shutdown()
        self.logger.debug("Sent shutdown notification to worker threads.")
