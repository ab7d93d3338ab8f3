"""The middleware that ends jobs at their limits: its settings, and what it does with a job that goes on all the same."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Literal

from dramatiq.middleware import Middleware, TimeLimit

from ..common.callables import is_sync_callable
from ..common.durations import WEEK_MS
from ..common.safe_logger import Lines, SafeLogger
from ..delivery.decision import Decision
from ..delivery.delivery import RUNNING
from ..delivery.history import now_ms
from ..delivery.limits import (
    WARN_RATIO,
    checked,
    expired_after,
    finite,
    limit_for,
    milliseconds,
    warn_if_close,
)
from ..errors import ConfigurationError, QueueTimeoutExceeded
from ..interrupts import supported
from ..outcomes import Outcome
from .base import PolicyMiddleware

if TYPE_CHECKING:
    from dramatiq.broker import Broker
    from typing_extensions import Self

    from ..delivery.broker_state import BrokerState
    from ..delivery.delivery import Delivery
    from ..delivery.executor import Proceed

__all__ = ["StuckJob", "Timeout"]

alerts = SafeLogger("dramatiq_policies.alerts")

DEFAULT_MS: Final = 600_000
#: What a worker process exits with when ``on_stuck="exit"`` ends it; ``EX_SOFTWARE`` of sysexits.
STUCK_EXIT_CODE: Final = 70
#: How long, in seconds, everybody has to be told of a stuck job before ``on_stuck="exit"`` ends the process anyway.
_TOLD_WITHIN: Final = 5.0
#: How long, in seconds, the master then has to read the record from its pipe: once the last of its processes has ended,
#: it reads no more.
_READ_WITHIN: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class StuckJob:
    """A job that still runs when its timeout and the grace after it are over.

    Attributes:
      actor: The actor's name.
      queue: The name of the queue.
      message_id: The message's id.
      elapsed_ms: How long it has run, in milliseconds.
      stack: The Python stack of its thread (of its coroutine, its greenlet), as in a traceback.
    """

    actor: str
    queue: str
    message_id: str
    elapsed_ms: float
    stack: str


OnStuck = Literal["log", "exit"] | Callable[[StuckJob], object]


class Timeout(PolicyMiddleware, TimeLimit):
    """Interrupts jobs that run for too long, and expires messages that have waited for too long.

    Takes the place of Dramatiq's ``TimeLimit``. A job is interrupted by `TimeoutExceeded`, within milliseconds of its
    limit and never after its end; what can't be interrupted (a blocking C call) is reported.

    Parameters:
      default: How long a job may run, in milliseconds or as a ``timedelta``. ``float("inf")`` for no limit. Ten minutes
        by default.
      queue_default: How long a message may wait for its first run, from the moment it is ready. None for no limit.
      grace: How long after its timeout a job is reported as stuck, in milliseconds or as a ``timedelta``.
      on_stuck: What to do with a stuck job beside the CRITICAL record, which is always written, once. ``"log"``: nothing.
        ``"exit"``: end the worker process at once with code 70, without ending its other jobs; the broker redelivers
        the messages of all of them, and the ``dramatiq`` command then stops and exits with that code, for its
        supervisor to start it again. A callable: call it with a `StuckJob`.
      time_limit: Dramatiq's name for ``default``; counts where ``default`` is not given.
      interval: Accepted for Dramatiq's sake, and ignored: nothing is polled.

    Actor options:
      timeout: As ``default``, for one actor; None for the default. At most seven days.
      time_limit: Dramatiq's name for it, without the bound. Not beside ``timeout``.
      queue_timeout: As ``queue_default``, for one actor; None for the default, ``float("inf")`` for no limit.

    A message's own ``timeout`` or ``time_limit`` overrides either option of its actor.

    Raises:
      ConfigurationError: An argument makes no sense.
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
        # TimeLimit's own constructor would make a thread that looks at the clock once a second.
        self._given = default is not None or time_limit is not None
        if default is None:
            self.default = _argument("time_limit", time_limit, None, DEFAULT_MS)
        else:
            self.default = _argument("default", default, WEEK_MS, DEFAULT_MS)
        self.queue_default: float | None = None
        if queue_default is not None:
            self.queue_default = finite(_argument("queue_default", queue_default, WEEK_MS, 0))
        grace_ms = milliseconds(grace)
        if grace_ms is None or not 0 <= grace_ms < math.inf:
            raise ConfigurationError.of_option("Timeout", "grace", "milliseconds, 0 or more, or a timedelta", grace)
        if on_stuck not in ("log", "exit") and not is_sync_callable(on_stuck, 1):
            raise ConfigurationError.of_option(
                "Timeout", "on_stuck", "'log', 'exit' or a callable(stuck_job) that is no coroutine function", on_stuck
            )
        self.time_limit = self.default
        self.interval = interval
        self.on_stuck = on_stuck
        #: Called with each `StuckJob` before ``on_stuck``; they must not take long.
        self.stuck_subscribers: list[Callable[[StuckJob], object]] = []
        #: The jobs that were reported and, as far as anybody has looked since, go on.
        self.stuck_jobs: list[Delivery] = []
        #: How long after the deadline a job is stuck, in seconds: with `stuck`, what `interrupts.threads.run` wants to know.
        self.grace = grace_ms / 1_000

    replaces = (TimeLimit, "interrupt each job")

    @property
    def is_explicit(self) -> bool:
        """Whether somebody chose the default limit."""
        return self._given or self.default != DEFAULT_MS

    @property
    def actor_options(self) -> set[str]:
        return {"time_limit", "timeout", "queue_timeout"}

    def attach(self, state: BrokerState) -> None:
        state.stuck_listener = self
        state.add_around_job(around_job, order=0)
        # One list, whoever came first.
        state.stuck_subscribers += self.stuck_subscribers
        self.stuck_subscribers = state.stuck_subscribers

    def for_stub(self) -> Self:
        twin = super().for_stub()
        twin.stuck_subscribers, twin.stuck_jobs = [], []
        return twin

    # The clock runs while the actor's function does, and not from hook to hook.
    before_process_message = Middleware.before_process_message
    after_process_message = Middleware.after_process_message
    after_skip_message = Middleware.after_skip_message  # type: ignore[assignment]

    def after_process_boot(self, broker: Broker) -> None:
        super().after_process_boot(broker)
        supported()

    def inherit_settings(self, stock: TimeLimit) -> None:
        """Keep the limit of the TimeLimit that was on the broker, where none was given."""
        if not self._given:
            self.default = self.time_limit = float(stock.time_limit)

    def resolve(self, options: Mapping[str, Any]) -> tuple[float | None, float | None]:
        """The timeout and the queue timeout of an actor in milliseconds, None for none, from its valid options."""
        timeout = options.get("timeout")
        if timeout is None:
            timeout = options.get("time_limit")
        limit = self.default if timeout is None else milliseconds(timeout)
        waiting = options.get("queue_timeout")
        return finite(limit), self.queue_default if waiting is None else finite(milliseconds(waiting))

    def stuck(self, job: Delivery, stack: str) -> None:
        """Report a job that goes on after its timeout and the grace. Called on a thread of its own."""
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
            self._tell(record, job.timeout_ms)
            return
        telling = threading.Thread(target=self._tell, args=(record, job.timeout_ms), daemon=True)
        try:
            telling.start()
            telling.join(_TOLD_WITHIN)
            time.sleep(_READ_WITHIN)
        finally:
            os._exit(STUCK_EXIT_CODE)

    def still_stuck(self) -> list[Delivery]:
        """The jobs that were reported and still go on."""
        return [job for job in self.stuck_jobs if job.stage == RUNNING]

    def _tell(self, record: StuckJob, timeout_ms: float | None) -> None:
        # Who was stuck is written down first: its message is about to come back beside those of its neighbours.
        for subscriber in list(self.stuck_subscribers):
            self._call(subscriber, record)
        alerts.critical(
            "The job %s (message %s) is stuck: it has run for %.0f ms, its timeout is %s ms, and it can't be interrupted "
            "where it is.%s\n%s",
            record.actor,
            record.message_id,
            record.elapsed_ms,
            None if timeout_ms is None else round(timeout_ms),
            " The worker process exits." if self.on_stuck == "exit" else "",
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
        except BaseException:  # Not even an exit: the others, and the record, come after it.
            alerts.exception("%r failed when it was told of a stuck job.", subscriber)


def _argument(option: str, value: Any, most: int | None, default: float) -> float:
    limit = checked("Timeout", option, value, most)
    return default if limit is None else limit


def around_job(delivery: Delivery, proceed: Proceed) -> Any:
    """Set a job's time limit, or skip its message if the message has waited for too long."""
    policy = delivery.policy
    limit = None
    if policy is not None:
        if policy.queue_timeout_ms is not None:
            _expire(delivery, policy.queue_timeout_ms)
        limit = limit_for(delivery.message.options, policy.timeout_ms, policy.actor_name)
    delivery.timeout_ms = limit
    if limit is None:
        return proceed(delivery)
    try:
        return proceed(delivery)
    finally:
        started, ended = delivery.started, delivery.ended
        if started is not None and ended is not None and limit * WARN_RATIO < (ended - started) * 1_000 <= limit:
            warn_if_close(delivery)


def _expire(delivery: Delivery, queue_timeout_ms: float) -> None:
    """Skip a message that waited too long before its first run."""
    waited = expired_after(delivery.message, queue_timeout_ms, now_ms())
    if waited is None:
        return
    error = QueueTimeoutExceeded(f"waited {waited:.0f} ms in its queue; its queue_timeout is {queue_timeout_ms:.0f} ms")
    delivery.skip(Decision(Outcome.EXPIRED, exception=error, dead_letter=True), str(error))
