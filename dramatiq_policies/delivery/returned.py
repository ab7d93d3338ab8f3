"""Messages enqueued again after the dead-letter queue refused them. Each carries a failure and does not run."""

from __future__ import annotations

from typing import Any

from ..errors import HandoffFailed
from ..outcomes import BAD_ENDINGS, Outcome
from .decision import Decision
from .history import FAILURE

__all__ = ["RETURNED", "decision_of_returned", "wait_before_return"]

#: The message option with the number of returns.
RETURNED = "returned"
_FIRST_RETURN = 10_000
_LAST_RETURN = 300_000


def wait_before_return(times: int) -> int:
    """Return the milliseconds to wait before the next return, after ``times`` earlier returns."""
    return min(_FIRST_RETURN << min(times, 10), _LAST_RETURN)


def decision_of_returned(options: dict[str, Any]) -> Decision | None:
    """Return the decision in a returned message; None for other messages."""
    failure, times = options.get(FAILURE), options.get(RETURNED)
    if type(times) is not int or not isinstance(failure, dict):
        options.pop(RETURNED, None)
        return None
    try:
        outcome = Outcome(failure.get("outcome"))
    except ValueError:
        outcome = Outcome.DEAD
    reason, attempts = failure.get("reason"), failure.get("attempts")
    return Decision(
        outcome if outcome in BAD_ENDINGS or outcome is Outcome.SKIPPED else Outcome.DEAD,
        reason if isinstance(reason, str) else None,
        exception=HandoffFailed(f"{failure.get('exception')}: {failure.get('message')}"),
        attempt=attempts if type(attempts) is int else None,
        dead_letter=True,
    )
