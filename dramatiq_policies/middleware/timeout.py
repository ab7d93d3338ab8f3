"""How long a job may run, and how long a message may wait for its first run."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Literal

from dramatiq.middleware import Middleware, TimeLimit

from .. import interrupts
from ..callables import is_coroutine_callable
from ..delivery import READY_AT, RUNNING
from ..durations import WEEK_MS
from ..errors import ConfigurationError
from ..history import POLICIES
from .base import PolicyMiddleware

if TYPE_CHECKING:
    from dramatiq import Message
    from dramatiq.broker import Broker, MessageProxy
    from typing_extensions import Self

    from ..delivery import Delivery
    from ..wiring import Wiring

__all__ = ["StuckJob", "Timeout", "expired_after", "limit_for", "validate", "warn_if_close"]

logger = logging.getLogger("dramatiq_policies.outcomes")
alerts = logging.getLogger("dramatiq_policies.alerts")

DEFAULT_MS: Final = 600_000
#: The share of its timeout that a job may use before it is warned of.
CLOSE: Final = 0.8
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
            self.queue_default = _finite(_argument("queue_default", queue_default, WEEK_MS, 0))
        grace_ms = _milliseconds(grace)
        if grace_ms is None or not 0 <= grace_ms < math.inf:
            raise ConfigurationError.of_option("Timeout", "grace", "milliseconds, 0 or more, or a timedelta", grace)
        if on_stuck not in ("log", "exit") and (not callable(on_stuck) or is_coroutine_callable(on_stuck)):
            raise ConfigurationError.of_option(
                "Timeout", "on_stuck", "'log', 'exit' or a callable that is no coroutine function", on_stuck
            )
        self.time_limit = self.default
        self.interval = interval
        self.on_stuck = on_stuck
        #: Called with each `StuckJob` before ``on_stuck``; they must not take long.
        self.stuck_subscribers: list[Callable[[StuckJob], object]] = []
        #: The jobs that were reported and, as far as anybody has looked since, go on.
        self.stuck_jobs: list[Delivery] = []
        #: How long after the deadline a job is stuck, in seconds: with `stuck`, what `interrupts.call` wants to know.
        self.grace = grace_ms / 1_000

    @property
    def is_explicit(self) -> bool:
        """Whether somebody chose the default limit."""
        return self._given or self.default != DEFAULT_MS

    @property
    def actor_options(self) -> set[str]:
        return {"time_limit", "timeout", "queue_timeout"}

    def attach(self, wiring: Wiring) -> None:
        # One list, whoever came first.
        wiring.stuck_subscribers += self.stuck_subscribers
        self.stuck_subscribers = wiring.stuck_subscribers

    def for_stub(self) -> Self:
        twin = super().for_stub()
        twin.stuck_subscribers = []
        return twin

    # The clock runs while the actor's function does, and not from hook to hook.
    before_process_message = Middleware.before_process_message
    after_process_message = Middleware.after_process_message
    after_skip_message = Middleware.after_skip_message  # type: ignore[assignment]

    def after_process_boot(self, broker: Broker) -> None:
        super().after_process_boot(broker)
        interrupts.supported()

    def take_over(self, stock: TimeLimit) -> None:
        """Keep the limit of the TimeLimit that was on the broker, where none was given."""
        if not self._given:
            self.default = self.time_limit = float(stock.time_limit)

    def resolve(self, options: Mapping[str, Any]) -> tuple[float | None, float | None]:
        """The timeout and the queue timeout of an actor in milliseconds, None for none, from its valid options."""
        timeout = options.get("timeout")
        if timeout is None:
            timeout = options.get("time_limit")
        limit = self.default if timeout is None else _milliseconds(timeout)
        waiting = options.get("queue_timeout")
        return _finite(limit), self.queue_default if waiting is None else _finite(_milliseconds(waiting))

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
            record.stack,
            extra={
                "actor": record.actor,
                "queue": record.queue,
                "message_id": record.message_id,
                "duration_ms": record.elapsed_ms,
                "timeout_ms": timeout_ms,
                "stack": record.stack,
            },
        )
        if callable(self.on_stuck):
            self._call(self.on_stuck, record)

    def _call(self, subscriber: Callable[[StuckJob], object], record: StuckJob) -> None:
        try:
            subscriber(record)
        except Exception:
            alerts.exception("%r failed when it was told of a stuck job.", subscriber)


def validate(where: str, options: Mapping[str, Any]) -> None:
    """Check an actor's options; ``where`` names it in the error.

    Raises:
      ConfigurationError: ``timeout`` beside ``time_limit``, or one of them or ``queue_timeout`` that is no duration.
    """
    if options.get("timeout") is not None and options.get("time_limit") is not None:
        raise ConfigurationError.of_option(
            where, "timeout", "either timeout or time_limit", {k: options[k] for k in ("timeout", "time_limit")}
        )
    for option, most in _MOST_MS.items():
        _checked(where, option, options.get(option), most)


#: The options, and the longest that each may be.
_MOST_MS: Final[dict[str, int | None]] = {"timeout": WEEK_MS, "time_limit": None, "queue_timeout": WEEK_MS}


def limit_for(options: Mapping[str, Any], actor_timeout_ms: float | None, actor: str) -> float | None:
    """How long one message's job may run, in milliseconds, None for no limit.

    Parameters:
      options: The message's. Its ``timeout``, else its ``time_limit``, counts if it is a duration; otherwise it is
        ignored, with one warning per actor and option.
      actor_timeout_ms: As `Timeout.resolve` says.
      actor: The actor's name.
    """
    if "timeout" not in options and "time_limit" not in options:
        return actor_timeout_ms
    for option in ("timeout", "time_limit"):
        value = options.get(option)
        if value is None:
            continue
        limit = _within(value, _MOST_MS[option])
        if limit is not None:
            return _finite(limit)
        if (actor, option) not in _warned:
            _warned.add((actor, option))
            logger.warning(
                "A message of actor %s has %s=%.100r, which is not %s; it is ignored, here and from now on.",
                actor,
                option,
                value,
                _expected(_MOST_MS[option]),
                extra={"actor": actor},
            )
    return actor_timeout_ms


_warned: set[tuple[str, str]] = set()


def expired_after(message: Message[Any] | MessageProxy, queue_timeout_ms: float | None, now_ms: float) -> float | None:
    """How long a message has waited for its first run, in milliseconds, if that is longer than it may; else None.

    Parameters:
      message: Its option ``ready_at`` says since when it is ready, in ms since the epoch. A message without it was
        enqueued by stock Dramatiq, and is ready since it was made.
      queue_timeout_ms: As `Timeout.resolve` says.
      now_ms: The time, in ms since the epoch.

    A message that was run before, or put back, never expires, nor does one whose clock is ahead of ours or unreadable.
    """
    if queue_timeout_ms is None:
        return None
    options = message.options
    if options.get("retries") or options.get(POLICIES):
        return None
    ready = options.get(READY_AT)
    if ready is None:
        ready = message.message_timestamp
    if type(ready) not in (int, float):
        return None
    waited: float = now_ms - ready
    # Ready before 1971 is no time but a default, or seconds for milliseconds.
    return waited if waited > queue_timeout_ms and ready > 365 * 24 * 3_600_000 else None


def warn_if_close(delivery: Delivery) -> None:
    """Warn if a job that has ended, and was not timed out, used over 80 % of its timeout."""
    limit = delivery.timeout_ms
    if limit is None:
        return
    elapsed = delivery.elapsed_ms()
    if elapsed <= CLOSE * limit:
        return
    message = delivery.message
    logger.warning(
        "The job %s (message %s) ran for %.0f ms, %.0f %% of its timeout of %.0f ms.",
        message.actor_name,
        message.message_id,
        elapsed,
        elapsed / limit * 100,
        limit,
        extra={
            "actor": message.actor_name,
            "queue": message.queue_name,
            "message_id": message.message_id,
            "duration_ms": elapsed,
            "timeout_ms": limit,
        },
    )


def _milliseconds(value: Any) -> float | None:
    """A duration as a finite or infinite number of milliseconds; None if it is none."""
    if isinstance(value, timedelta):
        return value / timedelta(milliseconds=1)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return None if math.isnan(value) else value


def _within(value: Any, most: int | None) -> float | None:
    limit = _milliseconds(value)
    if limit is None or limit <= 0 or (most is not None and most < limit < math.inf):
        return None
    return limit


def _finite(limit: float | None) -> float | None:
    return None if limit == math.inf else limit


def _expected(most: int | None) -> str:
    bound = "more than 0" if most is None else "more than 0 and at most 7 days"
    return f'milliseconds or a timedelta, {bound}, or float("inf") for no limit'


def _checked(where: str, option: str, value: Any, most: int | None) -> float | None:
    if value is None:
        return None
    limit = _within(value, most)
    if limit is None:
        raise ConfigurationError.of_option(where, option, _expected(most), value)
    return limit


def _argument(option: str, value: Any, most: int | None, default: float) -> float:
    limit = _checked("Timeout", option, value, most)
    return default if limit is None else limit
