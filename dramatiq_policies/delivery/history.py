"""The history that a message carries: counters for the rules, the last failures, and the failure of a dead letter.

The message option ``policies`` holds the counters and failures; the option ``failure`` of a dead letter holds the reason.
Both may come from another version of this library or from any other sender: reading never raises, and ignores unreadable
values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..common.clock import now_ms
from ..common.texts import encodable_all
from ..outcomes import class_path, text_of
from .tracebacks import traceback_of

if TYPE_CHECKING:
    from .decision import Decision

__all__ = [
    "FAILURE",
    "POLICIES",
    "History",
    "attempt_of",
    "failure_of",
    "replays_of",
    "retries_of",
    "run_of",
]

#: The message option with our counters.
POLICIES = "policies"
#: The option of a dead letter with the reason.
FAILURE = "failure"

_KEPT = 10
_RUNS_OF_A_REPLAY = 1_000_000


def _count(value: object) -> int:
    return value if type(value) is int and 0 <= value < 2**53 else 0


def retries_of(options: dict[str, Any]) -> int:
    """Return Dramatiq's count of retries, which includes the retries by our rules."""
    return _count(options.get("retries"))


def attempt_of(options: dict[str, Any]) -> int:
    """Return the number of the next run of the message, 1 for the first. Dramatiq's retries and retries by our rules count.

    The option ``retries`` includes the retries by our rules. Version 0.1.0 counted its retries in ``total`` instead.
    """
    stored = options.get(POLICIES)
    ours = _count(stored.get("total")) if isinstance(stored, dict) else 0
    return 1 + retries_of(options) + ours


def replays_of(options: dict[str, Any]) -> int:
    """Return how often the message was replayed from the dead letters.

    A replay by our command increments the count and removes the option ``failure``. After a replay by any other means, the
    ``failure`` is still present.
    """
    stored = options.get(POLICIES)
    counted = _count(stored.get("replays")) if isinstance(stored, dict) else 0
    return counted + (FAILURE in options)


def run_of(options: dict[str, Any]) -> int:
    """Return a number for this run of the message, higher for each later run.

    A redelivery or a copy has the same number. A snoozed run counts as a run, like a failed run.
    """
    if POLICIES not in options and FAILURE not in options:
        # Fast path: most messages have neither.
        return retries_of(options)
    stored = options.get(POLICIES)
    snoozes = _count(stored.get("snoozes")) if isinstance(stored, dict) else 0
    return replays_of(options) * _RUNS_OF_A_REPLAY + attempt_of(options) - 1 + snoozes


class History:
    """The counters and failures that one message carries.

    Attributes:
      attempt: The number of this run, 1 for the first.
      runs: By the rule's stable id: how many runs the rule ended, and when the first of these runs ended (ms since the
        epoch).
      total: How many runs our rules ended that the option ``retries`` does not count: 0.1.0 counted such runs here.
      failures: The last ten failed runs.
      snoozed_since: When the job snoozed for the first time, in ms since the epoch.
      snoozes: How often the job snoozed.
      deferrals: How often in a row the message was put back without a run.
      replays: How often our command replayed the message.
    """

    __slots__ = ("attempt", "deferrals", "failures", "replays", "runs", "snoozed_since", "snoozes", "total")

    def __init__(self, options: dict[str, Any]) -> None:
        self.attempt = attempt_of(options)
        stored = options.get(POLICIES)
        if not isinstance(stored, dict):
            stored = {}
        runs = stored.get("runs")
        self.runs: dict[str, tuple[int, int]] = {}
        if isinstance(runs, dict):
            for rule, entry in runs.items():
                if isinstance(entry, list) and len(entry) == 2 and _count(entry[0]) and _count(entry[1]):
                    self.runs[rule] = (entry[0], entry[1])
        self.total = _count(stored.get("total"))
        failures = stored.get("history")
        self.failures = [f for f in failures if isinstance(f, dict)][-_KEPT:] if isinstance(failures, list) else []
        self.snoozed_since = _count(stored.get("snoozed_since")) or None
        self.snoozes = _count(stored.get("snoozes"))
        self.deferrals = _count(stored.get("deferrals"))
        self.replays = _count(stored.get("replays"))

    def count(self, rule: str, now: int) -> tuple[int, int]:
        """Count another run that ``rule`` ended. Returns the new count, and when the first of these runs ended."""
        number, first = self.runs.get(rule, (0, now))
        self.runs[rule] = (number + 1, first)
        self.total += 1
        return number + 1, first

    def retry_by_rule(self, options: dict[str, Any]) -> None:
        """Count a retry by a rule in ``retries``, where Dramatiq and other readers expect the count."""
        self.total -= 1
        options["retries"] = retries_of(options) + 1

    @property
    def ended(self) -> int:
        """How many runs our rules ended."""
        return sum(number for number, _ in self.runs.values())

    @property
    def retried(self) -> int:
        """How many retries in the option ``retries`` are by our rules."""
        return max(0, self.ended - self.total)

    def failed(self, error: BaseException, now: int, delay_ms: int | None) -> None:
        """Remember a failed run."""
        self.failures = [
            *self.failures[1 - _KEPT :],
            {
                "attempt": self.attempt,
                "exception": class_path(type(error)),
                "message": text_of(error),
                "failed_at": now,
                "delay_ms": delay_ms,
            },
        ]

    def option(self) -> dict[str, Any]:
        """Return the value of the message option."""
        stored: dict[str, Any] = {"runs": {rule: list(entry) for rule, entry in self.runs.items()}}
        stored["total"] = self.total
        stored["history"] = self.failures
        if self.snoozed_since is not None:
            stored["snoozed_since"] = self.snoozed_since
        for name in ("snoozes", "deferrals", "replays"):
            if number := getattr(self, name):
                stored[name] = number
        return stored


def failure_of(decision: Decision, options: dict[str, Any], tags: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the option ``failure`` of a dead letter. The key ``tags`` is present only if the actor has tags."""
    history = History(options)
    error = decision.exception
    return {
        "outcome": decision.outcome.value,
        "reason": decision.reason,
        "exception": None if error is None else class_path(type(error)),
        "message": None if error is None else text_of(error),
        "traceback": None if error is None else traceback_of(error),
        "attempts": decision.attempt or history.attempt,
        "history": history.failures,
        "failed_at": now_ms(),
        **({"tags": encodable_all(tags)} if tags else {}),
    }
