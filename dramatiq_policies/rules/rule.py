"""What a rule is: an exception class, perhaps narrowed by `when`, and what becomes of its errors.

Pure, and knows nothing of messages or brokers. `rule_set` says which of several rules decides.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from importlib import import_module
from typing import Any, Literal

from ..common.callables import is_sync_callable
from ..common.safe_logger import SafeLogger
from ..errors import ConfigurationError, checked_duration
from .backoff import Wait, as_wait, exponential

__all__ = ["Owner", "RetryPolicy", "Rule", "Verb", "When", "reject_duplicates", "when"]

logger = SafeLogger("dramatiq_policies.rules")

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
            object.__setattr__(self, "max_elapsed", checked_duration(where, "max_elapsed", self.max_elapsed))
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
      ConfigurationError: If the predicate can't be called with one argument, or is a coroutine or generator function
        (whose result is always truthy).
    """
    given: Any = predicate
    if not is_sync_callable(given, 1):
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
        except BaseException:  # Not even an exit: see `user_errors`.
            logger.exception("The predicate of %s (%s) failed and does not match.", self.id, self.where)
            return False


def reject_duplicates(rules: Iterable[Rule]) -> None:
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
