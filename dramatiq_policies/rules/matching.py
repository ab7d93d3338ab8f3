"""Choose the rule for an exception. Pure: no messages, no brokers."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from typing import Any

from ..common.safe_logger import SafeLogger
from ..errors import ConfigurationError
from .rule import RetryPolicy, Rule, Verb, reject_duplicates

__all__ = ["RuleSet"]

logger = SafeLogger("dramatiq_policies.rules")


class RuleSet:
    """The rules for one actor: the actor's and the broker's.

    The rule for the nearest class in the exception's MRO wins. For the same class, the actor's rules go before the broker's,
    and a ``when`` goes before the bare class. Several ``when`` are tried in this order: ``retry_on``, ``discard_on``,
    ``alert_on``, each in the order of declaration. The order is computed once per exception type.
    """

    def __init__(self, actor_rules: tuple[Rule, ...] = (), broker_rules: tuple[Rule, ...] = ()) -> None:
        self.rules = (*actor_rules, *broker_rules)
        self._plans: dict[type[BaseException], tuple[bool, tuple[Rule, ...]]] = {}

    @property
    def max_attempts(self) -> int:
        """Return the highest number of attempts of any rule; 0 if no rule retries."""
        return max((policy.attempts for policy in self.retry_policies()), default=0)

    def retry_policies(self) -> list[RetryPolicy]:
        """Return the policies of the retry rules."""
        return [rule.policy for rule in self.rules if rule.policy is not None]

    def resolve(self) -> None:
        """Import the classes declared as dotted paths.

        Raises:
          ConfigurationError: A path leads nowhere, or one owner names the same bare class twice.
        """
        for rule in self.rules:
            rule.resolve()
        # An actor's rules have no paths: they were compared at their declaration.
        reject_duplicates(rule for rule in self.rules if rule.owner == "broker")

    def unreachable(self) -> tuple[Rule, ...]:
        """Return the rules that never decide, because another rule for the same class always goes before.

        Raises:
          ConfigurationError: A dotted path leads nowhere.
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
        """Return the rules for errors of a class in the order of trying: each ``when``, then a bare class."""
        return self._plan(cls)[1]

    def match(self, error: BaseException) -> Rule | None:
        """Return the rule that decides about an error, or None."""
        found = self.match_leaf(error)
        return None if found is None else found[0]

    def match_leaf(self, error: BaseException) -> tuple[Rule, BaseException] | None:
        """Return the deciding rule and the matching error. In an exception group the error is a leaf.

        If a leaf alerts, alert. Else if a leaf discards, discard. Else retry by the rule with the fewest attempts. A rule for
        the group's own class counts if no leaf has a rule.
        """
        if self.is_group(error):
            found = [(rule, leaf) for leaf in self.leaves(error) if (rule := self.match_itself(leaf))]
            if found:
                return min(found, key=_severity)
        rule = self.match_itself(error)
        return None if rule is None else (rule, error)

    def match_itself(self, error: BaseException) -> Rule | None:
        """Return the rule for an error's own class, also for an exception group."""
        return _first(self._plan(type(error))[1], error)

    def is_group(self, error: BaseException) -> bool:
        """Return whether the error is an exception group."""
        return self._plan(type(error))[0]

    def _plan(self, cls: type[BaseException]) -> tuple[bool, tuple[Rule, ...]]:
        """Return whether the class is an exception group, and its rules in the order of trying."""
        plan = self._plans.get(cls)
        if plan is None:
            if len(self._plans) >= _REMEMBERED:
                # Bound the cache: exception classes may be created dynamically.
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
                logger.critical("A rule is ignored: %s", error)
                continue
            if distance is not None:
                ranked.append((distance, rule.owner == "broker", rule.predicate is None, rule))
        # The sort is stable: equal rules keep the order of declaration.
        ordered = [entry[-1] for entry in sorted(ranked, key=lambda entry: entry[:-1])]
        # A bare class always matches: drop the rules behind the first.
        bare = next((index for index, rule in enumerate(ordered) if rule.predicate is None), len(ordered))
        return tuple(ordered[: bare + 1])

    def leaves(self, group: BaseException) -> Iterator[BaseException]:
        """Yield the errors in an exception group and in its nested groups."""
        # No recursion: groups may be nested deeper than the stack.
        pending: list[Any] = [group]
        while pending:
            error = pending.pop()
            if self._plan(type(error))[0]:
                pending.extend(reversed(error.exceptions))
            else:
                yield error


#: The most classes with a cached plan.
_REMEMBERED = 1_000


def _group_classes() -> tuple[type[BaseException], ...]:
    """Return Python's group class (3.11 on), and the backport's if it is imported."""
    modules = (builtins, sys.modules.get("exceptiongroup"))
    return tuple(cls for module in modules if (cls := getattr(module, "BaseExceptionGroup", None)) is not None)


def _first(plan: tuple[Rule, ...], error: BaseException) -> Rule | None:
    for rule in plan:
        if rule.admits(error):
            return rule
    return None


def _severity(found: tuple[Rule, BaseException]) -> tuple[int, int]:
    rule = found[0]
    verbs = (Verb.ALERT, Verb.DISCARD, Verb.RETRY)
    return verbs.index(rule.verb), 0 if rule.policy is None else rule.policy.attempts
