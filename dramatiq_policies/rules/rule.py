"""A rule: an exception class, perhaps narrowed by `when`, and a verb: retry, discard or alert.

Pure: no messages, no brokers. `matching` chooses among several rules.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from importlib import import_module
from typing import Any, Literal

from ..common.callables import is_sync_callable
from ..common.safe_logger import SafeLogger
from ..errors import ConfigurationError, checked_duration
from .backoff import Wait, exponential
from .wait import as_wait

__all__ = ["Owner", "RetryPolicy", "Rule", "Verb", "When", "reject_duplicates", "when"]

logger = SafeLogger("dramatiq_policies.rules")

Then = Literal["dead", "discard", "alert"]
Owner = Literal["actor", "broker"]


class Verb(str, Enum):
    """The effect of a rule on a failed message."""

    RETRY = "retry"
    DISCARD = "discard"
    ALERT = "alert"


@dataclass(frozen=True)
class RetryPolicy:
    """How often, and after which waits, a rule retries a job.

    Eight attempts within an hour, then an alert::

        from datetime import timedelta

        from dramatiq_policies import RetryPolicy, actor, exponential

        @actor(
            retry_on={
                ConnectionError: RetryPolicy(
                    attempts=8,
                    wait=exponential(initial=timedelta(seconds=2), maximum=timedelta(minutes=10)),
                    max_elapsed=timedelta(hours=1),
                    then="alert",
                )
            }
        )
        def charge_card(order_id): ...

    Parameters:
      attempts: The number of runs, the first included. Default 5.
      wait: The wait before the next attempt: `exponential`, `polynomial`, `constant`, `retry_after`, any
        ``callable(attempt, exception) -> ms``, or a duration. Default ``exponential()``: 15 seconds, 30 seconds, a minute …
      max_elapsed: No attempt starts later than this after the rule's first failure. Milliseconds or a ``timedelta``. Default
        None, no limit.
      then: The end of a message without attempts left: ``"dead"`` (a dead letter, the default), ``"discard"`` or ``"alert"``.

    Raises:
      ConfigurationError: An argument is out of its range.
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


# Compared by identity: a When may be a mapping's key, and a predicate need not be hashable.
@dataclass(frozen=True, eq=False)
class When:
    """Exception classes narrowed by a predicate; made by `when`."""

    exceptions: type[BaseException] | str | Collection[type[BaseException] | str]
    predicate: Callable[[Any], object]


def when(
    exceptions: type[BaseException] | str | Collection[type[BaseException] | str], predicate: Callable[[Any], object]
) -> When:
    """Narrow exception classes by a condition. Use it in place of a class in any rule::

        def is_rate_limited(error):
            return error.response.status_code == 429

        @actor(retry_on={when(HTTPError, is_rate_limited): RetryPolicy(attempts=10, wait=retry_after())}, discard_on=HTTPError)
        def send_invoice(order_id): ...

    A rule with a condition goes before a rule for the bare class. Errors that fail the condition go on to the next rule.

    Parameters:
      exceptions: An exception class, or a tuple of classes. In the rules of an `ErrorClassifier` also a dotted string.
      predicate: ``callable(exception) -> bool``. If the predicate raises, the error is logged and the rule does not match.

    Raises:
      ConfigurationError: The predicate does not take one argument, or is a coroutine or generator function, whose result is
        always truthy.
    """
    given: Any = predicate
    if not is_sync_callable(given, 1):
        raise ConfigurationError.of_option("when()", "predicate", "a plain callable(exception) -> bool", given)
    return When(exceptions, predicate)


@dataclass(eq=False, slots=True)
class Rule:
    """One exception class with its verb.

    Attributes:
      verb: Retry, discard or alert.
      target: The exception class; until its first use perhaps a dotted path.
      predicate: The condition of `when`; None for the bare class.
      policy: The policy of a retry rule.
      id: The name of the rule's counter, stable over restarts and edits of other rules. Classes of one key in ``retry_on``
        share an id.
      owner: ``"actor"`` or ``"broker"``.
      where: The place of the declaration, for error messages.
    """

    verb: Verb
    target: type[BaseException] | str
    predicate: Callable[[Any], object] | None
    policy: RetryPolicy | None
    id: str
    owner: Owner
    where: str

    def resolve(self) -> type[BaseException]:
        """Return the exception class; import a dotted path.

        Raises:
          ConfigurationError: The path leads to no exception class.
        """
        if isinstance(self.target, str):
            self.target = _import(self.where, f"{self.verb.value}_on", self.target)
        return self.target

    def admits(self, error: BaseException) -> bool:
        """Return whether the rule has no predicate, or its predicate holds."""
        if self.predicate is None:
            return True
        try:
            held = self.predicate(error)
            if inspect.iscoroutine(held):
                held.close()
                raise TypeError("the predicate returned a coroutine, which is always truthy")
            return bool(held)
        except BaseException:  # User code may raise SystemExit; see `_job_errors`.
            logger.exception("The predicate of %s (%s) raised an error; the rule does not match.", self.id, self.where)
            return False


def reject_duplicates(rules: Iterable[Rule]) -> None:
    """Raise a `ConfigurationError` if one owner names a bare class twice."""
    seen: dict[type[BaseException] | str, Rule] = {}
    for rule in rules:
        if rule.predicate is None:
            # Two spellings of one path name the same class.
            key = rule.target.replace(":", ".") if isinstance(rule.target, str) else rule.target
            other = seen.setdefault(key, rule)
            if other is not rule:
                raise ConfigurationError.of_option(
                    rule.where,
                    f"{rule.verb.value}_on",
                    "each class once",
                    rule.target,
                    f"{other.verb.value}_on names it already; keep one, or narrow one by when()",
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
