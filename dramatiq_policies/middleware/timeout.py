"""Middleware: interrupt jobs at their timeout, and report stuck jobs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Literal

from dramatiq.middleware import Middleware, TimeLimit

from ..common.callables import is_sync_callable
from ..common.clock import now_ms
from ..common.durations import WEEK_MS, format_duration
from ..common.safe_logger import Lines, SafeLogger
from ..delivery.decision import Decision
from ..delivery.limits import (
    WARN_RATIO,
    checked_timeout,
    duration_ms,
    expired_after,
    none_if_infinite,
    timeout_of,
    warn_if_close,
)
from ..errors import ConfigurationError, QueueTimeoutExceeded, checked_duration
from ..interrupts import supported
from ..outcomes import Outcome, StuckJob
from .base import PolicyMiddleware

if TYPE_CHECKING:
    from dramatiq.broker import Broker
    from typing_extensions import Self

    from ..common.current import Job
    from ..delivery.broker_state import BrokerState
    from ..delivery.delivery import Delivery
    from ..delivery.executor import Proceed

__all__ = ["StuckJob", "Timeout"]

alerts = SafeLogger("dramatiq_policies.alerts")

DEFAULT_MS: Final = 600_000
#: The exit code of a worker process that ``on_stuck="exit"`` ends: ``EX_SOFTWARE`` of sysexits.
STUCK_EXIT_CODE: Final = 70
#: How long, in seconds, the reports of a stuck job may take before ``on_stuck="exit"`` ends the process anyway.
_NOTIFY_WITHIN: Final = 5.0
#: How long, in seconds, the master process then has to read the log record from its pipe. After the end of its last worker
#: process, the master reads no more.
_READ_WITHIN: Final = 0.2


OnStuck = Literal["log", "exit"] | Callable[[StuckJob], object]


class Timeout(PolicyMiddleware, TimeLimit):
    """Interrupt jobs at their timeout, and expire messages that have waited for too long::

        install(broker, timeout=Timeout(default=timedelta(minutes=2), on_stuck="exit"))

        @actor(timeout=timedelta(seconds=30), queue_timeout=timedelta(minutes=10))
        def send_invoice(order_id): ...

    Timeout replaces Dramatiq's ``TimeLimit``. The worker raises `TimeoutExceeded` in the job, within milliseconds of the
    timeout and never after the job's end. A blocking C call can't be interrupted: the worker reports the job as stuck.

    Parameters:
      default: How long a job may run, in milliseconds or as a ``timedelta``. At most seven days; ``float("inf")`` for no
        limit. Default 600,000 (ten minutes).
      queue_default: How long a message may wait for its first run, from the moment it is ready, in milliseconds or as a
        ``timedelta``. Default None: no limit.
      grace: How long after its timeout the worker reports a job as stuck, in milliseconds or as a ``timedelta``. Default
        5,000 (five seconds).
      on_stuck: The reaction to a stuck job, after one CRITICAL log record. ``"log"``, the default: no more. ``"exit"``: end
        the worker process at once with code 70, without ending the other jobs of the process. The broker redelivers all
        their messages. The ``dramatiq`` command stops with the same code, and a supervisor must restart the command. A
        callable: called with a `StuckJob`.
      time_limit: Dramatiq's name for ``default``, without the bound of seven days. Used if ``default`` is not given.
      interval: Accepted for compatibility with Dramatiq and ignored: Timeout does not poll.

    Actor options:
      timeout: As ``default``, for one actor; None for the default. At most seven days.
      time_limit: Dramatiq's name for ``timeout``, without the bound. An actor can't have both.
      queue_timeout: As ``queue_default``, for one actor; None for the default, ``float("inf")`` for no limit.

    A ``timeout`` or ``time_limit`` on a message overrides both options of the actor.

    Raises:
      ConfigurationError: An argument is invalid.
    """

    def __init__(
        self,
        *,
        default: float | timedelta | None = None,
        queue_default: float | timedelta | None = None,
        grace: float | timedelta = 5_000,
        on_stuck: OnStuck = "log",
        time_limit: float | timedelta | None = None,
        interval: int | None = None,
    ) -> None:
        # No super().__init__(): TimeLimit's constructor would start a thread that polls once a second.
        self._given = default is not None or time_limit is not None
        if default is None:
            self.default = _argument("time_limit", time_limit, None, DEFAULT_MS)
        else:
            self.default = _argument("default", default, WEEK_MS, DEFAULT_MS)
        self.queue_default: float | None = None
        if queue_default is not None:
            self.queue_default = none_if_infinite(_argument("queue_default", queue_default, WEEK_MS, 0))
        self.grace_ms = checked_duration("Timeout", "grace", grace)
        if on_stuck not in ("log", "exit") and not is_sync_callable(on_stuck, 1):
            raise ConfigurationError.of_option(
                "Timeout", "on_stuck", "'log', 'exit' or a callable(stuck_job) that is no coroutine function", on_stuck
            )
        self.time_limit = self.default
        self.interval = interval
        self.on_stuck = on_stuck
        #: Called with each `StuckJob` before ``on_stuck``. A subscriber must not take long.
        self.stuck_subscribers: list[Callable[[StuckJob], object]] = []
        #: The reported jobs that still ran when `still_stuck` last looked.
        self.stuck_jobs: list[Job] = []
        #: Time between deadline and report, in seconds. `interrupts.threads.run` reads ``grace`` and calls `stuck`.
        self.grace = self.grace_ms / 1_000

    replaces = (TimeLimit, "interrupt each job")

    @property
    def is_explicit(self) -> bool:
        """Whether the user chose the default limit."""
        return self._given or self.default != DEFAULT_MS

    @property
    def actor_options(self) -> set[str]:
        return {*super().actor_options, "timeout", "queue_timeout"}

    def attach(self, state: BrokerState) -> None:
        state.timeout = self
        state.add_around_job(around_job, order=0)
        # Both share one list, in whichever order subscribers were added.
        state.outcomes.stuck_subscribers += self.stuck_subscribers
        self.stuck_subscribers = state.outcomes.stuck_subscribers

    def for_stub(self) -> Self:
        stub = super().for_stub()
        stub.stuck_subscribers, stub.stuck_jobs = [], []
        return stub

    # No hooks of TimeLimit: the clock runs only while the actor's function runs, not from hook to hook.
    before_process_message = Middleware.before_process_message
    after_process_message = Middleware.after_process_message
    after_skip_message = Middleware.after_skip_message  # type: ignore[assignment]

    def after_process_boot(self, broker: Broker) -> None:
        super().after_process_boot(broker)
        supported()

    def inherit_settings(self, stock: TimeLimit) -> None:
        """Keep the limit of the broker's TimeLimit, if the user gave no limit to this Timeout."""
        if not self._given:
            self.default = self.time_limit = float(stock.time_limit)

    def resolve(self, options: Mapping[str, Any]) -> tuple[float | None, float | None]:
        """Return an actor's timeout and queue timeout in milliseconds, from its valid options; None for no limit."""
        timeout = options.get("timeout")
        if timeout is None:
            timeout = options.get("time_limit")
        limit = self.default if timeout is None else duration_ms(timeout)
        waiting = options.get("queue_timeout")
        most_waiting = self.queue_default if waiting is None else none_if_infinite(duration_ms(waiting))
        if most_waiting is not None and self.attached_to is not None:
            self.attached_to.add_around_job(around_claimed_job, order=2)
        return none_if_infinite(limit), most_waiting

    def stuck(self, job: Job | None, stack: str) -> None:
        """Report a job that still runs after timeout and grace. Called on a separate thread."""
        assert job is not None  # `run_job` names the job of each run.
        self.stuck_jobs = [*self.still_stuck(), job]
        message = job.message
        record = StuckJob(
            actor=message.actor_name,
            queue=message.queue_name,
            message_id=message.message_id,
            elapsed_ms=job.elapsed_ms(),
            stack=stack,
        )
        if self.on_stuck != "exit":
            self._notify(record, job.timeout_ms)
            return
        notifying = threading.Thread(
            target=self._notify, args=(record, job.timeout_ms), name="dramatiq-policies-on-stuck", daemon=True
        )
        try:
            notifying.start()
            notifying.join(_NOTIFY_WITHIN)
            time.sleep(_READ_WITHIN)
        finally:
            os._exit(STUCK_EXIT_CODE)

    def still_stuck(self) -> list[Job]:
        """Return the reported jobs that still run."""
        return [job for job in self.stuck_jobs if job.is_running]

    def _notify(self, record: StuckJob, timeout_ms: float | None) -> None:
        # Subscribers come first: Idempotency uncounts the starts of the other jobs before the process may exit.
        for subscriber in list(self.stuck_subscribers):
            self._call(subscriber, record)
        alerts.critical(
            "Job %s (message %s) is stuck: it has run for %s, the timeout is %s, and the "
            "interrupt has no effect.%s\n%s",
            record.actor,
            record.message_id,
            format_duration(record.elapsed_ms),
            format_duration(timeout_ms),
            " The worker process exits."
            if self.on_stuck == "exit"
            else " Give the call at the end of the stack a timeout.",
            Lines(record.stack),
            extra={
                "actor": record.actor,
                "queue": record.queue,
                "message_id": record.message_id,
                "duration_ms": record.elapsed_ms,
                "timeout_ms": timeout_ms,
                "stack": Lines(record.stack),
            },
        )
        if callable(self.on_stuck):
            self._call(self.on_stuck, record)

    def _call(self, subscriber: Callable[[StuckJob], object], record: StuckJob) -> None:
        try:
            subscriber(record)
        except BaseException:  # SystemExit too: the other subscribers and the log record must still follow.
            alerts.exception("%r raised an error when called with a stuck job.", subscriber)


def _argument(option: str, value: object, most: int | None, default: float) -> float:
    limit = checked_timeout("Timeout", option, value, most)
    return default if limit is None else limit


def around_job(delivery: Delivery, proceed: Proceed) -> Any:
    """Set a job's time limit, or skip its message if the message has waited for too long."""
    policy = delivery.policy
    limit = None
    if policy is not None:
        if policy.queue_timeout_ms is not None and not _may_have_completed(delivery):
            _expire(delivery, policy.queue_timeout_ms)
        limit = timeout_of(delivery.message.options, policy.timeout_ms, policy.actor_name)
    delivery.timeout_ms = limit
    if limit is None:
        return proceed(delivery)
    try:
        return proceed(delivery)
    finally:
        started, ended = delivery.started, delivery.ended
        if started is not None and ended is not None and limit * WARN_RATIO < (ended - started) * 1_000 <= limit:
            warn_if_close(delivery)


def around_claimed_job(delivery: Delivery, proceed: Proceed) -> Any:
    """Skip a redelivered message after too long a wait, once the claim has shown that its key is not completed."""
    policy = delivery.policy
    if policy is not None and policy.queue_timeout_ms is not None and _may_have_completed(delivery):
        _expire(delivery, policy.queue_timeout_ms)
    return proceed(delivery)


def _may_have_completed(delivery: Delivery) -> bool:
    """Return whether a worker may have completed the key of a message and died before the acknowledgement."""
    idempotency = None if delivery.policy is None else delivery.policy.idempotency
    return delivery.redelivered and idempotency is not None and idempotency.keyed


def _expire(delivery: Delivery, queue_timeout_ms: float) -> None:
    """Skip a message after too long a wait before the first run."""
    waited = expired_after(delivery.message, queue_timeout_ms, now_ms())
    if waited is None:
        return
    error = QueueTimeoutExceeded(
        f"waited {format_duration(waited)} in the queue; the queue_timeout is {format_duration(queue_timeout_ms)}"
    )
    delivery.skip(Decision(Outcome.EXPIRED, exception=error, dead_letter=True), str(error))
