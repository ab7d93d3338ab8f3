"""Which rule applies to an exception: pure, and knows nothing of messages or brokers.

For one class the actor's rules come before the broker's, and within each a ``when`` before the bare class. Of several
``when`` those under ``retry_on`` are tried first, then ``discard_on``, then ``alert_on``, each in the order declared.
"""

from __future__ import annotations

import builtins
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from importlib import import_module
from typing import Any, Literal, get_args

from .backoff import Wait, as_wait, exponential
from .callables import accepts, is_coroutine_callable
from .durations import to_ms
from .errors import ConfigurationError

__all__ = ["Owner", "RetryPolicy", "Rule", "RuleSet", "Verb", "When", "refuse_twice", "when"]

logger = logging.getLogger("dramatiq_policies.rules")

Then = Literal["dead", "discard", "alert"]
Owner = Literal["actor", "broker"]


class Verb(str, Enum):
    """What a rule does with its errors."""

    RETRY = "retry"
    DISCARD = "discard"
    ALERT = "alert"


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how long to retry.

    Parameters:
      attempts: How many runs in all, the first included. Default 5.
      wait: Until the next attempt: a wait of `backoff`, any ``callable(attempt, exception) -> ms``, or a constant
        duration. Default ``exponential()``.
      max_elapsed: From the rule's first failure on, how long new attempts may start, in milliseconds or as a
        ``timedelta``. Default None, without end.
      then: What becomes of the message when its retries are used up: ``"dead"`` (default), ``"discard"``, ``"alert"``.

    Raises:
      ConfigurationError: If an argument is out of its range.
    """

    attempts: int = 5
    wait: Wait | int | timedelta = field(default_factory=exponential)
    max_elapsed: int | timedelta | None = None
    then: Then = "dead"

    def __post_init__(self) -> None:
        where = "RetryPolicy"
        if type(self.attempts) is not int or self.attempts < 1:
            raise ConfigurationError.of_option(where, "attempts", "an int of at least 1", self.attempts)
        object.__setattr__(self, "wait", as_wait(where, "wait", self.wait))
        if self.max_elapsed is not None:
            try:
                object.__setattr__(self, "max_elapsed", to_ms(self.max_elapsed))
            except (TypeError, ValueError):
                raise ConfigurationError.of_option(
                    where, "max_elapsed", "milliseconds, a timedelta or None", self.max_elapsed
                ) from None
        if self.then not in ("dead", "discard", "alert"):
            raise ConfigurationError.of_option(where, "then", "'dead', 'discard' or 'alert'", self.then)


# Compared by identity: it may be a mapping's key, and a predicate need not be hashable.
@dataclass(frozen=True, eq=False)
class When:
    """A class, or several, narrowed by a predicate. See `when`."""

    exceptions: Any
    predicate: Callable[[Any], object]


def when(exceptions: Any, predicate: Callable[[Any], object]) -> When:
    """Narrow a class: ``when(HTTPError, lambda e: e.response.status_code == 429)`` stands wherever a class does.

    Parameters:
      exceptions: An exception class or a tuple of them.
      predicate: Called with the error. One that raises does not match, and is logged.

    Raises:
      ConfigurationError: If the predicate can't be called with one argument, or is a coroutine function (whose result
        is always truthy).
    """
    given: Any = predicate
    if not callable(given) or is_coroutine_callable(given) or not accepts(given, 1):
        raise ConfigurationError.of_option("when()", "predicate", "a plain callable(exception) -> bool", given)
    return When(exceptions, predicate)


@dataclass(eq=False, slots=True)
class Rule:
    """One declared class, and what becomes of its errors.

    Attributes:
      verb: What is done.
      target: The exception class, or its dotted path until it is first used.
      predicate: What narrows it, None for the bare class.
      policy: How a retry rule retries.
      id: Stable over restarts and edits of other rules: the name of its counter. What was declared to share one counter
        shares it.
      owner: Who declared it.
      where: For error messages.
    """

    verb: Verb
    target: type[BaseException] | str
    predicate: Callable[[Any], object] | None
    policy: RetryPolicy | None
    id: str
    owner: Owner
    where: str

    def resolve(self) -> type[BaseException]:
        """The exception class.

        Raises:
          ConfigurationError: If a dotted path leads to none.
        """
        if isinstance(self.target, str):
            self.target = _import(self.where, f"{self.verb.value}_on", self.target)
        return self.target

    def admits(self, error: BaseException) -> bool:
        """Whether its predicate, if it has one, holds."""
        if self.predicate is None:
            return True
        try:
            held = self.predicate(error)
            if inspect.iscoroutine(held):
                held.close()
                raise TypeError("the predicate returned a coroutine, which is always truthy")
            return bool(held)
        except Exception:
            logger.exception("The predicate of %s (%s) failed and does not match.", self.id, self.where)
            return False


def refuse_twice(rules: Iterable[Rule]) -> None:
    """Raise a `ConfigurationError` if one bare class stands under two verbs, or twice."""
    seen: dict[type[BaseException] | str, Rule] = {}
    for rule in rules:
        if rule.predicate is None:
            # Two spellings of one path are one class.
            key = rule.target.replace(":", ".") if isinstance(rule.target, str) else rule.target
            other = seen.setdefault(key, rule)
            if other is not rule:
                raise ConfigurationError.of_option(
                    rule.where,
                    f"{rule.verb.value}_on",
                    "each class once",
                    rule.target,
                    f"It stands under {other.verb.value}_on already; keep one, or narrow one by when()",
                )


class RuleSet:
    """The rules that hold for one actor: its own and the broker's.

    For an exception the match nearest in its MRO wins, wherever it was declared; for one class the actor's before the
    broker's, and within each a ``when`` before the bare class. The order is worked out once per exception type.
    """

    def __init__(self, actor_rules: tuple[Rule, ...] = (), broker_rules: tuple[Rule, ...] = ()) -> None:
        self.rules = (*actor_rules, *broker_rules)
        self._plans: dict[type[BaseException], tuple[bool, tuple[Rule, ...]]] = {}

    @property
    def max_attempts(self) -> int | None:
        """The highest number of attempts that a rule allows; None if none retries."""
        return max((rule.policy.attempts for rule in self.rules if rule.policy is not None), default=None)

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
        for owner in get_args(Owner):
            refuse_twice(rule for rule in self.rules if rule.owner == owner)

    def unreachable(self) -> tuple[Rule, ...]:
        """The rules that never decide, because another one on the same class always comes before.

        Raises:
          ConfigurationError: If a dotted path leads nowhere.
        """
        reached = set()
        for target in {rule.resolve() for rule in self.rules}:
            predicates: list[Any] = []
            for rule in self._plan(target)[1]:
                if rule.target is target and not any(rule.predicate is known for known in predicates):
                    reached.add(rule)
                    predicates.append(rule.predicate)
        return tuple(rule for rule in self.rules if rule not in reached)

    def tried(self, cls: type[BaseException]) -> tuple[Rule, ...]:
        """The rules for errors of a class, in the order in which they are tried: any ``when`` first, then a bare class."""
        return self._plan(cls)[1]

    def match(self, error: BaseException) -> Rule | None:
        """The rule that decides on this error, or None."""
        if not self.rules:
            return None
        found = self.match_leaf(error)
        return None if found is None else found[0]

    def match_leaf(self, error: BaseException) -> tuple[Rule, BaseException] | None:
        """The rule, and the error that it names: in an exception group one of its leaves.

        Alert if any leaf alerts, else discard if any leaf discards, else retry by the leaf that allows the fewest
        attempts. A rule for the group itself counts where no leaf is named.
        """
        is_group, plan = self._plan(type(error))
        if is_group:
            found = [(rule, leaf) for leaf in self._leaves(error) if (rule := _first(self._plan(type(leaf))[1], leaf))]
            if found:
                return min(found, key=_severity)
        rule = _first(plan, error)
        return None if rule is None else (rule, error)

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
        for index, rule in enumerate(self.rules):
            try:
                distance = place.get(rule.resolve())
            except ConfigurationError as error:
                logger.critical("A rule is left out: %s", error)
                continue
            if distance is not None:
                ranked.append((distance, rule.owner == "broker", rule.predicate is None, index, rule))
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


def _severity(found: tuple[Rule, BaseException]) -> tuple[int, int]:
    rule = found[0]
    verbs = (Verb.ALERT, Verb.DISCARD, Verb.RETRY)
    return verbs.index(rule.verb), 0 if rule.policy is None else rule.policy.attempts


def _import(where: str, option: str, path: str) -> type[BaseException]:
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    try:
        found: Any = import_module(module or "builtins")
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise ConfigurationError.of_option(
            where, option, "the dotted path of an exception class", path, f"It can't be imported ({error})"
        ) from None
    if not (isinstance(found, type) and issubclass(found, BaseException)):
        raise ConfigurationError.of_option(where, option, "the dotted path of an exception class", path)
    return found
