"""What became of a message: one record per delivery, which every observer reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ._job_errors import quietly
from .common.safe_logger import SafeLogger
from .common.texts import encodable

__all__ = ["Outcome", "OutcomeEvent", "Subscriber"]

logger = SafeLogger("dramatiq_policies.outcomes")


class Outcome(str, Enum):
    """How one delivery ended. A ``str``, so that it compares, formats and serialises as its value."""

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


#: The outcomes after which a message has ended badly for good.
BAD_ENDINGS = frozenset({Outcome.DISCARDED, Outcome.ALERTED, Outcome.DEAD, Outcome.EXPIRED})


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomeEvent:
    """One delivery's end. What does not apply, or can't be known, is None.

    Attributes:
      outcome: How it ended.
      reason: Why, where an outcome has several reasons (``exhausted``, ``unclassified``, ``running``, …).
      actor: The actor's name.
      queue: The canonical name of the queue (never ``.DQ``).
      message_id: The message's id, the same in all its attempts.
      attempt: Which run this was, 1 for the first.
      wait_ms: From ready to started.
      duration_ms: How long the actor ran; None if it did not.
      delay_ms: Until the message is ready again (retried, deferred).
      exception: What the job raised, or the stand-in that explains the end.
      rule: The stable id of the rule that decided.
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
        """The fields for a log record's ``extra=``, under the names that dashboards and alerts may rely on."""
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


def traceparent_of(message: Any) -> str | None:
    """The message's option ``traceparent``, by which its sender is found, if it is a text."""
    value = None if message is None else message.options.get("traceparent")
    return value[:200] if isinstance(value, str) and value else None


def extra_of(event: OutcomeEvent, message: Any) -> dict[str, Any]:
    """The fields of a log record, with the message's ``traceparent`` where it has one."""
    traceparent = traceparent_of(message)
    return event.extra() if traceparent is None else {**event.extra(), "traceparent": traceparent}


#: Called with each record, on the thread that worked on the message. What it raises is logged and changes nothing.
Subscriber = Callable[[OutcomeEvent], object]


def class_path(cls: type[Any]) -> str:
    """The dotted path of a class."""
    return encodable(quietly(lambda: f"{cls.__module__}.{cls.__qualname__}") or "an unreadable class")


def text_of(error: BaseException, limit: int = 1_000) -> str:
    """``str(error)``, cut at ``limit`` characters, also where the error's own ``__str__`` is broken."""
    try:
        # An exact str: a subclass of the user's may have methods of its own.
        text = str.__str__(str(error))
    except BaseException as broken:  # Not even an exit: see `user_errors`.
        text = f"<{type(error).__name__}: its text raised {type(broken).__name__}>"
    text = encodable(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"
