"""Which rule applies to an exception: pure, and knows nothing of messages or brokers."""

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
        reject_duplicates(rule for rule in self.rules if rule.owner == "broker")

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
        """The rule, and the error that it names: in an exception group one of its leaves.

        Alert if any leaf alerts, else discard if any leaf discards, else retry by the leaf that allows the fewest
        attempts. A rule for the group itself counts where no leaf is named.
        """
        if self.is_group(error):
            found = [(rule, leaf) for leaf in self.leaves(error) if (rule := self.match_itself(leaf))]
            if found:
                return min(found, key=_severity)
        rule = self.match_itself(error)
        return None if rule is None else (rule, error)

    def match_itself(self, error: BaseException) -> Rule | None:
        """The rule for an error itself, also where the error is an exception group."""
        return _first(self._plan(type(error))[1], error)

    def is_group(self, error: BaseException) -> bool:
        """Whether the error is an exception group."""
        return self._plan(type(error))[0]

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

    def leaves(self, group: BaseException) -> Iterator[BaseException]:
        """The errors in an exception group and in the groups in it."""
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


def _severity(found: tuple[Rule, BaseException]) -> tuple[int, int]:
    rule = found[0]
    verbs = (Verb.ALERT, Verb.DISCARD, Verb.RETRY)
    return verbs.index(rule.verb), 0 if rule.policy is None else rule.policy.attempts
