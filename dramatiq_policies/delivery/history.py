"""What a message carries about its own past: counters for the rules, the last failures, and why it is dead.

In transit it is the message option ``policies``; a dead letter says why in the option ``failure``. Both may come from
another version of this library, or from anybody: reading never raises, and takes what it can't read as absent.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .._job_errors import quietly, user_frames
from ..common import clock
from ..common.texts import encodable, encodable_all
from ..outcomes import class_path, text_of

if TYPE_CHECKING:
    from .decision import Decision

__all__ = [
    "FAILURE",
    "POLICIES",
    "History",
    "attempt_of",
    "failure_of",
    "now_ms",
    "replays_of",
    "retries_of",
    "run_of",
    "traceback_of",
]

#: The message option that carries our counters.
POLICIES = "policies"
#: The message option of a dead letter that says why it is one.
FAILURE = "failure"

_KEPT = 10
_RUNS_OF_A_REPLAY = 1_000_000
_TRACEBACK_LIMIT = 10_000
_FRAMES = 30


def now_ms() -> int:
    """The time in milliseconds since the epoch."""
    return int(clock.time() * 1_000)


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**53 else 0


def retries_of(options: dict[str, Any]) -> int:
    """Dramatiq's count of a message's retries, which those of our rules are part of."""
    return _count(options.get("retries"))


def attempt_of(options: dict[str, Any]) -> int:
    """Which run of its message comes next, 1 for the first: stock's retries and those of our rules together.

    The retries of rules are part of the option ``retries``; those that 0.1.0 made are counted in ``total`` instead.
    """
    carried = options.get(POLICIES)
    ours = _count(carried.get("total")) if isinstance(carried, dict) else 0
    return 1 + retries_of(options) + ours


def replays_of(options: dict[str, Any]) -> int:
    """How often its message was replayed from the dead letters.

    A replay by our command counts itself and takes the ``failure`` away; by any other means the ``failure`` is still there.
    """
    carried = options.get(POLICIES)
    counted = _count(carried.get("replays")) if isinstance(carried, dict) else 0
    return counted + (FAILURE in options)


def run_of(options: dict[str, Any]) -> int:
    """A number that names this run of its message, and is higher in each later one.

    A redelivery and a copy have the same. Not only failures count: a job that snoozed has run.
    """
    carried = options.get(POLICIES)
    snoozes = _count(carried.get("snoozes")) if isinstance(carried, dict) else 0
    return replays_of(options) * _RUNS_OF_A_REPLAY + attempt_of(options) - 1 + snoozes


class History:
    """The counters and failures that one message carries.

    Attributes:
      attempt: Which run this was, 1 for the first.
      runs: For each rule's stable id how many runs it ended, and when the first one did (ms since the epoch).
      total: How many runs our rules ended that the option ``retries`` does not count: 0.1.0 counted them here.
      failures: The last ten failed runs.
      snoozed_since: When the job snoozed for the first time, ms since the epoch.
      snoozes: How often it has.
      deferrals: How often in a row the message was put back unrun.
      replays: How often it was replayed by our command.
    """

    __slots__ = ("attempt", "deferrals", "failures", "replays", "runs", "snoozed_since", "snoozes", "total")

    def __init__(self, options: dict[str, Any]) -> None:
        self.attempt = attempt_of(options)
        carried = options.get(POLICIES)
        if not isinstance(carried, dict):
            carried = {}
        runs = carried.get("runs")
        self.runs: dict[str, tuple[int, int]] = {}
        if isinstance(runs, dict):
            for rule, entry in runs.items():
                if isinstance(entry, list) and len(entry) == 2 and _count(entry[0]) and _count(entry[1]):
                    self.runs[rule] = (entry[0], entry[1])
        self.total = _count(carried.get("total"))
        failures = carried.get("history")
        self.failures = [f for f in failures if isinstance(f, dict)][-_KEPT:] if isinstance(failures, list) else []
        self.snoozed_since = _count(carried.get("snoozed_since")) or None
        self.snoozes = _count(carried.get("snoozes"))
        self.deferrals = _count(carried.get("deferrals"))
        self.replays = _count(carried.get("replays"))

    def count(self, rule: str, now: int) -> tuple[int, int]:
        """Count one more run that ``rule`` ended; its number, and when the first one was."""
        number, first = self.runs.get(rule, (0, now))
        self.runs[rule] = (number + 1, first)
        self.total += 1
        return number + 1, first

    def retry_by_rule(self, options: dict[str, Any]) -> None:
        """Count the retry of a run that a rule ended where Dramatiq counts retries, and others read them."""
        self.total -= 1
        options["retries"] = retries_of(options) + 1

    @property
    def ended(self) -> int:
        """How many runs our rules ended."""
        return sum(number for number, _ in self.runs.values())

    @property
    def retried(self) -> int:
        """How many of the retries that the option ``retries`` counts were made by our rules."""
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
        """The value of the message option."""
        carried: dict[str, Any] = {"runs": {rule: list(entry) for rule, entry in self.runs.items()}}
        carried["total"] = self.total
        carried["history"] = self.failures
        if self.snoozed_since is not None:
            carried["snoozed_since"] = self.snoozed_since
        for name in ("snoozes", "deferrals", "replays"):
            if number := getattr(self, name):
                carried[name] = number
        return carried


def failure_of(decision: Decision, options: dict[str, Any], tags: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The option ``failure`` of a dead letter; ``tags`` in it only if its actor has some."""
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


def traceback_of(error: BaseException) -> str | None:
    """Return an error's traceback from the user's code on, the last 10,000 characters; None if the error has none."""
    stack = user_frames(quietly(lambda: error.__traceback__))
    if stack is None:
        return None
    text = quietly(lambda: "".join(traceback.format_exception(type(error), error, stack, limit=-_FRAMES)))
    if text is None:
        frames = "".join(traceback.format_tb(stack, limit=-_FRAMES))
        text = f"Traceback (most recent call last):\n{frames}{class_path(type(error))}: {text_of(error)}\n"
    text = encodable(text)
    # The end of a traceback says most.
    return text if len(text) <= _TRACEBACK_LIMIT else "…" + text[1 - _TRACEBACK_LIMIT :]
