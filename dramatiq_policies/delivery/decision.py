"""What becomes of a delivery, once that is decided."""

from __future__ import annotations

from ..outcomes import Outcome

__all__ = ["COMPLETING", "SUCCEEDED", "Decision"]


class Decision:
    """What was decided: how the delivery ends, and what becomes of its message.

    Attributes:
      outcome, reason, exception, rule, delay_ms, attempt: As in the record that is published.
      dead_letter: The message goes to the dead-letter queue.
    """

    __slots__ = ("attempt", "dead_letter", "delay_ms", "exception", "outcome", "reason", "rule")

    def __init__(
        self,
        outcome: Outcome,
        reason: str | None = None,
        *,
        exception: BaseException | None = None,
        rule: str | None = None,
        delay_ms: int | None = None,
        dead_letter: bool = False,
        attempt: int | None = None,
    ) -> None:
        self.outcome = outcome
        self.reason = reason
        self.exception = exception
        self.rule = rule
        self.delay_ms = delay_ms
        self.dead_letter = dead_letter
        self.attempt = attempt


#: Every success is the same decision.
SUCCEEDED = Decision(Outcome.SUCCEEDED)


#: The outcomes after which an idempotency key is completed.
COMPLETING = frozenset({Outcome.SUCCEEDED, Outcome.DUPLICATE})
