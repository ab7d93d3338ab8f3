"""How a delivery ends."""

from __future__ import annotations

from ..outcomes import Outcome

__all__ = ["COMPLETING", "SUCCEEDED", "Decision"]


class Decision:
    """How a delivery ends, and whether its message becomes a dead letter.

    Attributes:
      outcome, reason, exception, rule, delay_ms, attempt: As in `OutcomeEvent`.
      dead_letter: Whether the message goes to the dead-letter queue.
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


#: The decision of every success.
SUCCEEDED = Decision(Outcome.SUCCEEDED)


#: Outcomes that complete an idempotency key.
COMPLETING = frozenset({Outcome.SUCCEEDED, Outcome.DUPLICATE})
