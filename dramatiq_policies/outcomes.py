"""The outcome of a delivery: one record per delivery, for all observers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from ._job_errors import quietly
from .common.safe_logger import SafeLogger
from .common.texts import encodable

if TYPE_CHECKING:
    from dramatiq import Message
    from dramatiq.broker import MessageProxy

__all__ = ["Outcome", "OutcomeEvent", "StuckJob", "Subscriber"]

logger = SafeLogger("dramatiq_policies.outcomes")


class Outcome(str, Enum):
    """The end of one delivery. Derives from ``str``: compares, formats and serialises as its value::

        if event.outcome in (Outcome.DEAD, Outcome.EXPIRED):
            pages.send(f"{event.actor}: {event.outcome}")

    Attributes:
      SUCCEEDED: The actor returned.
      RETRIED: The actor failed; a rule runs the message again after a wait.
      DISCARDED: The actor failed; a rule drops the message.
      ALERTED: The actor failed; a rule alerts, and the message is a dead letter.
      DEAD: The message is a dead letter. The reason says why.
      DUPLICATE: The key or the work is done already; the actor did not run.
      DEFERRED: The message waits, without a used attempt: its key runs elsewhere, the store is down, or the job snoozed.
      EXPIRED: The message waited longer than its ``queue_timeout``, and is a dead letter.
      INTERRUPTED: The worker shut down; the message is back on its queue, without a used attempt.
      SKIPPED: Another middleware skipped or failed the message.
    """

    SUCCEEDED = "succeeded"
    RETRIED = "retried"
    DISCARDED = "discarded"
    ALERTED = "alerted"
    DEAD = "dead"
    DUPLICATE = "duplicate"
    DEFERRED = "deferred"
    EXPIRED = "expired"
    INTERRUPTED = "interrupted"
    SKIPPED = "skipped"

    def __str__(self) -> str:
        return self.value


#: The outcomes of messages that have failed permanently.
BAD_ENDINGS = frozenset({Outcome.DISCARDED, Outcome.ALERTED, Outcome.DEAD, Outcome.EXPIRED})


@dataclass(frozen=True, slots=True, kw_only=True)
class StuckJob:
    """A job beyond timeout and grace, still running. ``Timeout(on_stuck=…)`` calls your function with it::

        def page(job: StuckJob) -> None:
            pages.send(f"{job.actor} {job.message_id} has run for {job.elapsed_ms:.0f} ms\\n{job.stack}")

    Attributes:
      actor: The actor's name.
      queue: The name of the queue.
      message_id: The message's id.
      elapsed_ms: How long the job has run, in milliseconds.
      stack: The Python stack of the job's thread (coroutine, greenlet), as in a traceback.
    """

    actor: str
    queue: str
    message_id: str
    elapsed_ms: float
    stack: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomeEvent:
    """The record of one delivery's end. Fields that do not apply, or are unknown, are None.

    Pass a callable to ``ErrorClassifier(on_outcome=…)`` to receive each record::

        def count(event: OutcomeEvent) -> None:
            outcomes.labels(event.actor, event.outcome).inc()

    Attributes:
      outcome: The end of the delivery.
      reason: The reason, for outcomes with several reasons (``exhausted``, ``unclassified``, ``running``, …).
      actor: The actor's name.
      queue: The canonical name of the queue (never ``.DQ``).
      message_id: The message's id, the same for all attempts.
      attempt: The number of this run, 1 for the first.
      wait_ms: The time from ready to started, in milliseconds.
      duration_ms: The run time of the actor, in milliseconds; None if it did not run.
      delay_ms: The time until the message is ready again (retried, deferred), in milliseconds.
      exception: The job's error, or an error of this library that explains the end.
      rule: The stable id of the deciding rule.
      tags: The actor's constant ``tags``.
    """

    outcome: Outcome
    reason: str | None = None
    actor: str | None = None
    queue: str | None = None
    message_id: str | None = None
    attempt: int | None = None
    wait_ms: float | None = None
    duration_ms: float | None = None
    delay_ms: int | None = None
    exception: BaseException | None = None
    rule: str | None = None
    tags: Mapping[str, str] | None = None

    def extra(self) -> dict[str, Any]:
        """Return the fields for ``extra=`` of a log record. Their names are stable: dashboards and alerts may rely on them."""
        error = self.exception
        return {
            "outcome": self.outcome.value,
            "reason": self.reason,
            "actor": self.actor,
            "queue": self.queue,
            "message_id": self.message_id,
            "attempt": self.attempt,
            "exception_type": None if error is None else class_path(type(error)),
            "exception_text": None if error is None else text_of(error),
            "duration_ms": self.duration_ms,
            "rule": self.rule,
            "tags": self.tags,
        }


def traceparent_of(message: Message[Any] | MessageProxy | None) -> str | None:
    """Return the message's option ``traceparent``, the trace of its sender, if it is a text."""
    value = None if message is None else message.options.get("traceparent")
    return value[:200] if isinstance(value, str) and value else None


def extra_of(event: OutcomeEvent, message: Message[Any] | MessageProxy | None) -> dict[str, Any]:
    """Return the fields of a log record, and the message's ``traceparent`` if there is one."""
    traceparent = traceparent_of(message)
    return event.extra() if traceparent is None else {**event.extra(), "traceparent": traceparent}


#: Called with each record, on the worker thread of the message. Its errors are logged and change nothing.
Subscriber = Callable[[OutcomeEvent], object]


def class_path(cls: type[Any]) -> str:
    """Return the dotted path of a class."""
    return encodable(quietly(lambda: f"{cls.__module__}.{cls.__qualname__}") or "an unreadable class")


def text_of(error: BaseException, limit: int = 1_000) -> str:
    """Return ``str(error)``, cut at ``limit`` characters; a placeholder if ``__str__`` raises."""
    try:
        # An exact str: a user's subclass may override methods.
        text = str.__str__(str(error))
    except BaseException as broken:  # User code may raise SystemExit; see `_job_errors`.
        text = f"<{type(error).__name__}: str() raised {type(broken).__name__}>"
    text = encodable(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"
