"""Check an actor's rules: how long they retry, and whether each can match."""

from __future__ import annotations

from collections.abc import Iterator

from ...common.durations import format_duration, to_ms
from ...common.plurals import counted
from ...errors import ConfigurationError
from ...outcomes import class_path
from ...rules.rule import RetryPolicy, Rule
from ...rules.wait import bounds_of
from ..explanations.explanation import unnamed
from .broker_checks import Found
from .checked_job import CheckedJob

__all__ = ["check_horizon", "check_rules", "retry_horizon"]

_DAY = 86_400_000


def check_horizon(job: CheckedJob) -> Found:
    for rule in job.policy.rules.rules:
        if rule.policy is not None and (longest := retry_horizon(rule.policy)) > _DAY:
            yield "DP026", f"The rule for {_target(rule)} gives up after up to {format_duration(longest)}"
    other = unnamed(job.actor)
    if other.outcome == "retried" and other.complete and other.attempts[-1].latest_ms > _DAY:
        runs, latest = len(other.attempts), format_duration(other.attempts[-1].latest_ms)
        yield "DP026", f"After an error without a rule the job runs up to {counted(runs, 'time')}, over up to {latest}"


def retry_horizon(policy: RetryPolicy) -> int:
    """Return the longest time from a rule's first failure to the start of its last attempt, without the time of the
    runs."""
    longest = sum(bounds_of(policy.wait, number)[1] for number in range(1, min(policy.attempts, 10_000)))
    return longest if policy.max_elapsed is None else min(longest, to_ms(policy.max_elapsed))


def check_rules(job: CheckedJob) -> Found:
    rules = job.policy.rules
    try:
        for rule in rules.unreachable():
            if rule.owner == "actor" or not _overridden(job, rule):
                yield "DP011", f"The rule for {_target(rule)} ({rule.verb.value}, {rule.where}) never matches"
        for wide, near in _beaten(rules.rules):
            text = f"{_target(near)} is a {_target(wide)} ({wide.verb.value}, by the actor)"
            yield "DP012", f"{text}, but the broker's rule is nearer and wins ({near.verb.value})"
    except ConfigurationError as error:
        yield "DP023", str(error)


def _beaten(rules: tuple[Rule, ...]) -> Iterator[tuple[Rule, Rule]]:
    """Yield each actor's rule with each different broker's rule for a narrower class."""
    own = [rule for rule in rules if rule.owner == "actor" and rule.predicate is None]
    named = {rule.resolve() for rule in own}
    for wide in own:
        for near in rules:
            narrower = near.resolve() not in named and issubclass(near.resolve(), wide.resolve())
            differs = near.verb is not wide.verb or near.policy != wide.policy
            if near.owner == "broker" and differs and narrower:
                yield wide, near


def _overridden(job: CheckedJob, rule: Rule) -> bool:
    """Whether the actor intentionally replaces a broker's rule by a rule for the same class."""
    return any(own.owner == "actor" and own.resolve() is rule.resolve() for own in job.policy.rules.rules)


def _target(rule: Rule) -> str:
    return rule.target if isinstance(rule.target, str) else class_path(rule.target).removeprefix("builtins.")
