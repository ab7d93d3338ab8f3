"""Which rule applies to an exception: pure, and knows nothing of messages or brokers."""

from __future__ import annotations

import builtins
import logging
import sys
from collections.abc import Iterator
from typing import Any

from dramatiq.errors import RateLimitExceeded, Retry
from dramatiq.middleware import Shutdown

from .durations import to_ms
from .errors import ConfigurationError, Snooze, Verdict
from .rules import RetryPolicy, Rule, Verb, refuse_twice

__all__ = ["RuleSet"]

logger = logging.getLogger("dramatiq_policies.rules")


class RuleSet:
    """The rules that hold for one actor: its own and the broker's.

    For an exception the match nearest in its MRO wins, wherever it was declared; for one class the actor's before the
    broker's, and within each a ``when`` before the bare class. Of several ``when`` those under ``retry_on`` are tried
    first, then ``discard_on``, then ``alert_on``, each in the order declared. All that is worked out once per exception
    type.
    """

    def __init__(self, actor_rules: tuple[Rule, ...] = (), broker_rules: tuple[Rule, ...] = ()) -> None:
        self.rules = (*actor_rules, *broker_rules)
        self._plans: dict[type[BaseException], tuple[bool, tuple[Rule, ...]]] = {}

    @property
    def max_attempts(self) -> int:
        """The highest number of attempts that a rule allows; 0 if none retries."""
        return max((policy.attempts for policy in self.retry_policies()), default=0)

    def retry_policies(self) -> list[RetryPolicy]:
        """Those of the rules that retry."""
        return [rule.policy for rule in self.rules if rule.policy is not None]

    def resolve(self) -> None:
        """Import what was declared as a dotted path, and see that it is not a class that stands there already.

        Raises:
          ConfigurationError: If a path leads nowhere, or one owner names the same bare class twice.
        """
        for rule in self.rules:
            rule.resolve()
        # An actor's rules hold no paths: those were compared when they were declared.
        refuse_twice(rule for rule in self.rules if rule.owner == "broker")

    def unreachable(self) -> tuple[Rule, ...]:
        """The rules that never decide, because another one on the same class always comes before.

        Raises:
          ConfigurationError: If a dotted path leads nowhere.
        """
        reached = set()
        for target in {rule.resolve() for rule in self.rules}:
            predicates: list[Any] = []
            for rule in self._plan(target)[1]:
                if not any(rule.predicate is known for known in predicates):
                    reached.add(rule)
                    predicates.append(rule.predicate)
        return tuple(rule for rule in self.rules if rule not in reached)

    def tried(self, cls: type[BaseException]) -> tuple[Rule, ...]:
        """The rules for errors of a class, in the order in which they are tried: any ``when`` first, then a bare class."""
        return self._plan(cls)[1]

    def match(self, error: BaseException) -> Rule | None:
        """The rule that decides on this error, or None."""
        found = self.match_leaf(error)
        return None if found is None else found[0]

    def match_leaf(self, error: BaseException) -> tuple[Rule, BaseException] | None:
        """The rule, and the error that it names: in an exception group one of its leaves."""
        rule, leaf = self.deciding(error)
        return None if rule is None else (rule, leaf)

    def deciding(self, error: BaseException) -> tuple[Rule | None, BaseException]:
        """The error that decides, in an exception group one of its leaves, and the rule that names it.

        Interrupts of a shutdown, `Verdict` and Dramatiq's ``Retry`` speak for themselves and need no rule. Of several
        leaves the first of these decides: an alert; a discard, by a rule or by `Discard`; a shutdown; the retry rule with
        the fewest attempts; ``Retry`` and ``RateLimitExceeded`` without a rule; `Snooze`. Of several ``Retry`` or `Snooze`
        the longest delay decides. A rule for the group itself counts where no leaf decides.
        """
        if not self._plan(type(error))[0]:
            return self._rule_for(error), error
        found = [
            (severity, rule, leaf)
            for leaf in self._leaves(error)
            if (severity := _severity(rule := self._rule_for(leaf), leaf)) is not None
        ]
        if found:
            return min(found, key=lambda entry: entry[0])[1:]
        return _first(self._plan(type(error))[1], error), error

    def _rule_for(self, leaf: BaseException) -> Rule | None:
        if isinstance(leaf, (Shutdown, Verdict)):
            return None
        rule = _first(self._plan(type(leaf))[1], leaf)
        # A job's own Retry is no error that a rule discards.
        return None if isinstance(leaf, Retry) and rule is not None and rule.verb is not Verb.RETRY else rule

    def _plan(self, cls: type[BaseException]) -> tuple[bool, tuple[Rule, ...]]:
        """Whether the class is one of exception groups, and the rules for it in the order in which they are tried."""
        plan = self._plans.get(cls)
        if plan is None:
            if len(self._plans) >= _REMEMBERED:
                # Somebody makes classes as he goes; they must not pile up here.
                self._plans.clear()
            plan = self._plans[cls] = (issubclass(cls, _group_classes()), self._ordered(cls))
        return plan

    def _ordered(self, cls: type[BaseException]) -> tuple[Rule, ...]:
        place = {base: index for index, base in enumerate(cls.__mro__)}
        ranked = []
        for rule in self.rules:
            try:
                distance = place.get(rule.resolve())
            except ConfigurationError as error:
                logger.critical("A rule is left out: %s", error)
                continue
            if distance is not None:
                ranked.append((distance, rule.owner == "broker", rule.predicate is None, rule))
        # A stable sort: those that are alike stay in the order declared.
        ordered = [entry[-1] for entry in sorted(ranked, key=lambda entry: entry[:-1])]
        # Nothing is tried behind a bare class.
        bare = next((index for index, rule in enumerate(ordered) if rule.predicate is None), len(ordered))
        return tuple(ordered[: bare + 1])

    def _leaves(self, group: BaseException) -> Iterator[BaseException]:
        # Not by recursion: groups may be nested deeper than the stack.
        pending: list[Any] = [group]
        while pending:
            error = pending.pop()
            if self._plan(type(error))[0]:
                pending.extend(reversed(error.exceptions))
            else:
                yield error


#: For how many classes a RuleSet remembers its plan.
_REMEMBERED = 1_000


def _group_classes() -> tuple[type[BaseException], ...]:
    """Python's own group class, from 3.11 on, and the backport's if somebody has imported it."""
    modules = (builtins, sys.modules.get("exceptiongroup"))
    return tuple(cls for module in modules if (cls := getattr(module, "BaseExceptionGroup", None)) is not None)


def _first(plan: tuple[Rule, ...], error: BaseException) -> Rule | None:
    for rule in plan:
        if rule.admits(error):
            return rule
    return None


#: The leaves of a group in the order in which they decide.
_ALERT, _DISCARD, _SHUTDOWN, _RETRY_RULE, _RETRY, _SNOOZE = range(6)
_OF_RULES = {Verb.ALERT: _ALERT, Verb.DISCARD: _DISCARD, Verb.RETRY: _RETRY_RULE}


def _severity(rule: Rule | None, leaf: BaseException) -> tuple[int, int] | None:
    """What `RuleSet.deciding` sorts the leaves of a group by; None for a leaf that decides nothing."""
    if rule is not None:
        return _OF_RULES[rule.verb], 0 if rule.policy is None else rule.policy.attempts
    if isinstance(leaf, Snooze):
        return _SNOOZE, -_delay_of(leaf)
    if isinstance(leaf, Verdict):
        return _DISCARD, 0
    if isinstance(leaf, Shutdown):
        return _SHUTDOWN, 0
    if isinstance(leaf, (Retry, RateLimitExceeded)):
        return _RETRY, -_delay_of(leaf)
    return None


def _delay_of(leaf: Any) -> int:
    try:
        return to_ms(leaf.delay)
    except Exception:
        return 0
