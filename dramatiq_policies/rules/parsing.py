"""Check ``retry_on``, ``discard_on`` and ``alert_on``, and make `Rule` objects of them."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import ConfigurationError
from .rule import Owner, RetryPolicy, Rule, Verb, When, reject_duplicates

__all__ = ["parse_rules", "readable_rule"]


def parse_rules(
    where: str, owner: Owner, *, retry_on: object = None, discard_on: object = None, alert_on: object = None
) -> tuple[Rule, ...]:
    """Return the rules of an actor or a broker.

    Raises:
      ConfigurationError: A declaration is wrong, or names a bare class twice.
    """
    rules: list[Rule] = []
    used: Counter[str] = Counter()
    for verb, declared in ((Verb.RETRY, retry_on), (Verb.DISCARD, discard_on), (Verb.ALERT, alert_on)):
        option = f"{verb.value}_on"
        for targets, policy in _entries(where, option, verb, declared):
            conditions = list(_flatten(where, option, targets, owner))
            if not conditions and isinstance(declared, Mapping):
                raise ConfigurationError.of_option(where, option, "an exception class for each policy", targets)
            together = isinstance(declared, Mapping)
            for counted in [conditions] if together else [[condition] for condition in conditions]:
                # Sorted: the order of a frozenset differs between processes.
                name = "|".join(sorted(_id(target, predicate, owner) for target, predicate in counted))
                used[name] += 1
                # Two lambdas on one class have the same name.
                unique = name if used[name] == 1 else f"{name}#{used[name]}"
                rules.extend(
                    Rule(verb, target, predicate, policy, unique, owner, where) for target, predicate in counted
                )
    reject_duplicates(rules)
    return tuple(rules)


def _entries(where: str, option: str, verb: Verb, declared: object) -> Iterator[tuple[Any, RetryPolicy | None]]:
    if declared is None:
        return
    if isinstance(declared, Mapping):
        if verb is not Verb.RETRY:
            raise ConfigurationError.of_option(
                where, option, "an exception class or a tuple of them", declared, "Only retry_on takes a mapping"
            )
        for targets, given in declared.items():
            if type(given) is int and given < 1:
                raise ConfigurationError.of_option(where, option, "at least 1 attempt", given)
            policy = RetryPolicy(attempts=given) if type(given) is int else given
            if not isinstance(policy, RetryPolicy):
                raise ConfigurationError.of_option(
                    where, option, "a RetryPolicy or a number of attempts for each class", policy
                )
            yield targets, policy
    else:
        yield declared, RetryPolicy() if verb is Verb.RETRY else None


def _flatten(
    where: str, option: str, declared: object, owner: Owner
) -> Iterator[tuple[type[BaseException] | str, Callable[[Any], object] | None]]:
    if isinstance(declared, (tuple, list, set, frozenset)):
        for one in declared:
            yield from _flatten(where, option, one, owner)
    elif isinstance(declared, When):
        narrowed = list(_flatten(where, option, declared.exceptions, owner))
        if not narrowed:
            raise ConfigurationError.of_option(where, option, "a class in when()", declared)
        for target, inner in narrowed:
            if inner is not None:
                raise ConfigurationError.of_option(where, option, "one when() around a class", declared)
            yield target, declared.predicate
    elif (isinstance(declared, type) and issubclass(declared, BaseException)) or (
        isinstance(declared, str) and owner == "broker"
    ):
        yield declared, None
    else:
        raise ConfigurationError.of_option(
            where,
            option,
            "an exception class, when(class, predicate), or a tuple or list of them",
            declared,
            _advice(declared),
        )


def _advice(got: object) -> str:
    if isinstance(got, BaseException):
        return f"Name the class {type(got).__name__}, not an instance of it"
    if isinstance(got, str):
        return "Import the class; only a broker's rules may be dotted paths"
    if isinstance(got, Mapping):
        return "A mapping can't be combined with others: retry_on={SomeError: RetryPolicy()}"
    if callable(got) and not isinstance(got, type):
        return "To narrow a class by a function write when(SomeError, function)"
    return "Did you mean a subclass of Exception?"


def _id(target: type[BaseException] | str, predicate: Callable[[Any], object] | None, owner: Owner) -> str:
    name = target.replace(":", ".") if isinstance(target, str) else f"{target.__module__}.{target.__qualname__}"
    if predicate is None:
        return name
    while isinstance(predicate, functools.partial):
        predicate = predicate.func
    # An actor's lambda and a broker's lambda for one class are two rules with two counters.
    mark = "?" if owner == "actor" else "??"
    return f"{name}{mark}{getattr(predicate, '__qualname__', type(predicate).__qualname__)}"


@functools.lru_cache  # Used in each log line of a retry.
def readable_rule(rule_id: str) -> str:
    """Return a rule's id for people: ``HTTPError when is_rate_limited`` for ``requests.HTTPError?is_rate_limited``.

    Log lines show it; records and dead letters keep the id.
    """
    return " or ".join(_readable(part) for part in rule_id.split("|"))


def _readable(part: str) -> str:
    name, mark, predicate = part.partition("?")
    name, _, number = name.partition("#")
    predicate, _, also = predicate.lstrip("?").partition("#")
    shown = name.rpartition(".")[2]
    if mark:
        function = re.sub(r".*<locals>\.", "", predicate)
        shown += f" when {'a lambda' if function.endswith('<lambda>') else function}"
    number = number or also
    return f"{shown} (no. {number})" if number else shown
