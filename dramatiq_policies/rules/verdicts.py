"""Find the error that decides about a failed job: the job's error, or a leaf of its exception group."""

from __future__ import annotations

from typing import Any

from dramatiq.errors import RateLimitExceeded, Retry
from dramatiq.middleware import Shutdown

from .._job_errors import is_a
from ..common.durations import to_ms
from ..errors import Snooze, Verdict
from .matching import RuleSet
from .rule import Rule, Verb

__all__ = ["deciding_rule"]


def deciding_rule(rules: RuleSet, error: BaseException) -> tuple[Rule | None, BaseException]:
    """Return the deciding rule (None: no rule) and the deciding error.

    A shutdown, a `Verdict` and Dramatiq's ``Retry`` need no rule. Of the leaves of a group the first of these decides: an alert;
    a discard, by a rule or by `Discard`; a shutdown; the retry rule with the fewest attempts; ``Retry`` and
    ``RateLimitExceeded`` without a rule; `Snooze`. Of several ``Retry`` or `Snooze` the longest delay decides. A rule for the
    group's own class counts if no leaf decides.
    """
    if not rules.is_group(error):
        return _rule_for(rules, error), error
    found = [
        (severity, rule, leaf)
        for leaf in rules.leaves(error)
        if (severity := _severity(rule := _rule_for(rules, leaf), leaf)) is not None
    ]
    if found:
        return min(found, key=lambda entry: entry[0])[1:]
    return rules.match_itself(error), error


def _rule_for(rules: RuleSet, leaf: BaseException) -> Rule | None:
    if is_a(leaf, (Shutdown, Verdict)):
        return None
    rule = rules.match_itself(leaf)
    # A rule may not discard a job's explicit Retry.
    return None if is_a(leaf, Retry) and rule is not None and rule.verb is not Verb.RETRY else rule


#: The leaves of a group, in the order of precedence.
_ALERT, _DISCARD, _SHUTDOWN, _RETRY_RULE, _RETRY, _SNOOZE = range(6)
_BY_RULE = {Verb.ALERT: _ALERT, Verb.DISCARD: _DISCARD, Verb.RETRY: _RETRY_RULE}


def _severity(rule: Rule | None, leaf: BaseException) -> tuple[int, int] | None:
    """Return the sort key of a group's leaf; None for a leaf without effect."""
    if rule is not None:
        return _BY_RULE[rule.verb], 0 if rule.policy is None else rule.policy.attempts
    if is_a(leaf, Snooze):
        return _SNOOZE, -_delay_of(leaf)
    if is_a(leaf, Verdict):
        return _DISCARD, 0
    if is_a(leaf, Shutdown):
        return _SHUTDOWN, 0
    if is_a(leaf, (Retry, RateLimitExceeded)):
        return _RETRY, -_delay_of(leaf)
    return None


def _delay_of(leaf: Any) -> int:
    try:
        return to_ms(leaf.delay)
    except BaseException:  # User code may raise SystemExit; see `_job_errors`.
        return 0
