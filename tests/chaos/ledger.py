"""The judgement of the ledger: the runs of each job, and the losses without an excuse."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple


@dataclass
class Run:
    """One run of an actor: who, when, and how far it came.

    Attributes:
      ended: When the actor returned or raised.
      concluded: When its outcome was published. All that makes a job run once had been written by then; a run that never
        came to this was cut short by a kill.
    """

    name: str
    key: str
    message_id: str
    process: int
    begun: float
    effect: float | None = None
    ended: float | None = None
    concluded: float | None = None
    outcome: str | None = None


class Freeze(NamedTuple):
    """A time in which what was written could not count: a process was stopped for longer than its claims last.

    Attributes:
      process: Which; None for all, when the store has lost what it took in that time.
    """

    process: int | None
    since: float
    until: float

    def hit(self, run: Run) -> bool:
        over = run.concluded
        return self.process in (None, run.process) and run.begun <= self.until and (over is None or over >= self.since)


@dataclass
class Ledger:
    """All runs, and all outcomes of messages that did not run."""

    runs: dict[str, Run] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    last: float = 0.0

    @classmethod
    def read(cls, path: Path) -> Ledger:
        found = cls()
        for line in path.read_text().splitlines():
            at, pid, what, name, *rest = line.split(" ")
            found.last = max(found.last, float(at))
            if what == "begin":
                found.runs[name] = Run(name, rest[0], rest[1], int(pid), float(at))
                continue
            if what == "outcome":
                actor, _, outcome, reason = rest
                found.outcomes[f"{actor} {outcome} {reason}"] += 1
                if name != "-":
                    run = found.runs[name]
                    run.concluded, run.outcome = float(at), outcome
                continue
            run = found.runs[name]
            if what == "effect":
                run.effect = float(at)
            else:
                run.ended = float(at)
        return found

    def by_key(self) -> dict[str, list[Run]]:
        found: dict[str, list[Run]] = defaultdict(list)
        for run in self.runs.values():
            found[run.key].append(run)
        return found

    def effects(self) -> Counter[str]:
        return Counter(run.key for run in self.runs.values() if run.effect is not None)


@dataclass
class Verdict:
    """The fate of the jobs.

    Attributes:
      lost: Jobs whose effect was never made.
      doubled: Effects made beyond the first of their key.
      bound: Runs that a kill or a freeze cut short between their beginning and their outcome: so many doubles no system of
        this kind can avoid.
      excess: Keys with more than one run that both made its effect and was concluded: nothing excuses these.
      beside: Keys of which two runs were under way at the same moment.
      dead: Dead letters that should not be, or should and are not.
      recovered: How many seconds after it began each run that was cut short had its job done.
    """

    lost: list[str]
    doubled: int
    bound: int
    excess: list[str]
    beside: list[str]
    dead: list[str]
    recovered: list[float]

    @property
    def wrong(self) -> dict[str, Any]:
        """Return the losses and repetitions without an excuse; empty if all is well."""
        wrong = {"lost": self.lost, "excess": self.excess, "beside": self.beside, "dead": self.dead}
        if self.doubled > self.bound:
            wrong["doubled"] = [f"{self.doubled} > {self.bound}"]
        return {what: keys for what, keys in wrong.items() if keys}

    def recovery(self) -> str:
        if not self.recovered:
            return "-"
        return f"{median(self.recovered):.1f} / {max(self.recovered):.1f}"


def judge(
    ledger: Ledger,
    expected: Iterable[str],
    doomed: Sequence[str],
    letters: Sequence[Any],
    freezes: Sequence[Freeze] = (),
) -> Verdict:
    """Compare the ledger with what was sent.

    Parameters:
      expected: The keys whose effect must have been made.
      doomed: The message ids that must be dead letters.
      letters: The dead letters.
      freezes: Processes that were stopped for longer than a lease; what they ran may run a second time.
    """

    def cut(run: Run) -> bool:
        return run.concluded is None or any(freeze.hit(run) for freeze in freezes)

    effects, by_key = ledger.effects(), ledger.by_key()
    guarded = {key: runs for key, runs in by_key.items() if not key.startswith("unguarded:")}
    begun_in_vain = Counter(run.message_id for run in ledger.runs.values() if cut(run))
    dead = Counter(dict.fromkeys(doomed, -1))
    store_lost_some = any(freeze.process is None for freeze in freezes)
    wrongly_dead, quarantined = [], set()
    for letter in letters:
        failure = letter.options["failure"]
        if failure["reason"] == "crashed" and begun_in_vain[letter.message_id] >= 3:
            quarantined.add(f"{letter.actor_name}:{letter.args[0]}")
        elif failure["reason"] == "no_result" and store_lost_some and effects[f"second:{letter.args[0]}"]:
            pass  # the result of the first message went with the store, and the first message has moved on
        elif letter.message_id in dead:
            dead[letter.message_id] += 1
        else:
            wrongly_dead.append(f"{letter.actor_name}{letter.args} {failure['outcome']} {failure['reason']}")
    missing = [f"no letter of {message_id}" for message_id, count in dead.items() if count < 0]
    return Verdict(
        lost=[key for key in expected if not effects[key] and key not in quarantined],
        doubled=sum(effects[key] - 1 for key in guarded if effects[key]),
        bound=sum(cut(run) for runs in guarded.values() for run in runs),
        excess=[
            key for key, runs in guarded.items() if sum(run.effect is not None and not cut(run) for run in runs) > 1
        ],
        beside=[key for key, runs in guarded.items() if _beside(runs, cut)],
        dead=[*wrongly_dead, *missing],
        recovered=[
            done - run.begun
            for runs in guarded.values()
            for run in runs
            if run.concluded is None and (done := _done_after(run, runs)) is not None
        ],
    )


def _beside(runs: list[Run], cut: Any) -> bool:
    """Whether one began while another was under way."""
    whole = [run for run in runs if run.ended is not None and not cut(run)]
    return any(other.begun <= run.begun < (other.ended or 0.0) for other in whole for run in runs if run is not other)


def _done_after(run: Run, runs: list[Run]) -> float | None:
    return min((other.effect for other in runs if other.effect is not None and other.effect > run.begun), default=None)
