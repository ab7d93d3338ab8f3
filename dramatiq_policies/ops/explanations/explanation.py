"""Explain an error's consequences from the same rules, waits and options that a worker uses."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from dramatiq.errors import RateLimitExceeded, Retry
from dramatiq.middleware import Shutdown

from ...common.durations import WEEK_MS, to_ms
from ...delivery.broker_state import state_of
from ...errors import Snooze, Verdict
from ...middleware.error_classifier import ErrorClassifier
from ...outcomes import class_path
from ...rules.rule import RetryPolicy, Rule, Verb
from ...rules.wait import bounds_of
from ..app import OperationError

if TYPE_CHECKING:
    from dramatiq import Actor

    from ...delivery.actor_policy import ActorPolicy

__all__ = ["Attempt", "Explanation", "explain", "policy_of", "predicate_name", "unnamed"]


@dataclass(frozen=True, slots=True)
class Attempt:
    """The start of a run, in ms after the first failure, without the time of the runs.

    Attributes:
      number: 1 for the first run, which starts the count.
      earliest_ms, latest_ms: The bounds of the start: jitter or Retry-After moves it between them.
    """

    number: int
    earliest_ms: int
    latest_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The consequences for a message if its job raises an error of a class.

    Attributes:
      actor, exception: The actor, and the error's class as a dotted path.
      outcome: The outcome of the first run: ``retried``, ``discarded``, ``alerted``, ``dead``, ``deferred`` or ``interrupted``.
      ending: The outcome after the last retry; equal to ``outcome`` without retries.
      reason: The reason of the ending.
      rule: The id of the deciding rule; None if no rule decides.
      why: The reason for this rule.
      only_if: The predicate of the rule, or None.
      attempts: All runs; a single run without retries.
      complete: Whether `attempts` lists all possible runs; False if a callable decides or retries have no limit.
      longest_ms: The longest time from the start of the first run to the end of the last, if each run takes its whole
        timeout; None if unknown.
      where_it_ends: The last place of the message.
    """

    actor: str
    exception: str
    outcome: str
    ending: str
    reason: str | None
    rule: str | None
    why: str
    only_if: str | None = None
    attempts: tuple[Attempt, ...] = (Attempt(1, 0, 0),)
    complete: bool = True
    longest_ms: int | None = None
    where_it_ends: str = ""

    def asdict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def explain(actor: Actor[..., Any], exception: type[BaseException]) -> tuple[Explanation, ...]:
    """Explain the consequences if an actor's job raises an error of a class.

    Returns several explanations if rules have predicates (``when``): all but the last have an ``only_if``.

    Raises:
      OperationError: The actor's broker has no dramatiq_policies.
    """
    case = _Case(actor, exception)
    if issubclass(exception, Shutdown):
        if case.option("max_retries") == 0:
            return (case.at_once("dead", "a worker's shutdown interrupts it, and max_retries is 0", "unclassified"),)
        return (case.at_once("interrupted", "a worker's shutdown requeues the message at once, and counts no attempt"),)
    if issubclass(exception, Snooze):
        return (case.at_once("deferred", "the job asks for a later run; no attempt is counted", "snoozed"),)
    if issubclass(exception, Verdict):
        return (case.at_once("discarded", "the job raises it itself"),)
    found = []
    for rule in case.policy.rules.tried(exception):
        if issubclass(exception, Retry) and rule.verb is not Verb.RETRY:
            continue
        found.append(case.by_rule(rule))
        if rule.predicate is None:
            return tuple(found)
    return (*found, case.unnamed())


def unnamed(actor: Actor[..., Any]) -> Explanation:
    """Explain the consequences of an error that no rule names."""
    return _Case(actor, Exception).unnamed()


@dataclass(slots=True)
class _Case:
    """An actor and a class of errors."""

    actor: Actor[..., Any]
    exception: type[BaseException]
    policy: ActorPolicy = field(init=False)
    classifier: ErrorClassifier = field(init=False)

    def __post_init__(self) -> None:
        self.policy = policy_of(self.actor)
        self.classifier = next(m for m in self.actor.broker.middleware if isinstance(m, ErrorClassifier))

    def option(self, name: str) -> Any:
        """Return the actor's option, else the broker's. Only ``max_retries`` may be declared as None."""
        value = self.actor.options.get(name)
        declared = name in self.actor.options if name == "max_retries" else value is not None
        return value if declared else getattr(self.classifier, name)

    def at_once(
        self, outcome: str, why: str, reason: str | None = None, rule: str | None = None, only_if: str | None = None
    ) -> Explanation:
        return Explanation(
            actor=self.actor.actor_name,
            exception=class_path(self.exception),
            outcome=outcome,
            ending=outcome,
            reason=reason,
            rule=rule,
            why=why,
            only_if=only_if,
            longest_ms=self._longest(1, 0, None),
            where_it_ends=self._where(outcome),
        )

    def by_rule(self, rule: Rule) -> Explanation:
        why, only_if = _why(rule, self.exception), predicate_name(rule)
        if rule.policy is None:
            outcome = "discarded" if rule.verb is Verb.DISCARD else "alerted"
            return self.at_once(outcome, why, rule=rule.id, only_if=only_if)
        return self._retried(rule.policy, rule.id, why, only_if)

    def unnamed(self) -> Explanation:
        """Explain an error without a rule: `unclassified`, or plain Dramatiq's options."""
        throws: Any = self.actor.options.get("throws")
        thrown = bool(throws) and issubclass(self.exception, throws)
        if self.classifier.unclassified is not None and not (
            thrown or issubclass(self.exception, (RateLimitExceeded, Retry))
        ):
            return self._retried(
                self.classifier.unclassified, "unclassified", "no rule names it; unclassified= applies"
            )
        if thrown:
            return self.at_once("dead", "Dramatiq's throws names it", "thrown")
        if self.option("retry_when") is not None:
            why = "no rule names it, and Dramatiq's retry_when decides each time"
            return self._stock(why, (Attempt(1, 0, 0),), complete=False)
        retries = self.option("max_retries")
        if retries is None:
            why = "no rule names it, and Dramatiq's max_retries is None: it is retried forever"
            return self._stock(why, (Attempt(1, 0, 0),), complete=False)
        if retries == 0:
            return self.at_once("dead", "no rule names it, and Dramatiq's max_retries is 0", "unclassified")
        least, most = self.option("min_backoff"), min(self.option("max_backoff"), WEEK_MS)
        attempts = _timeline(retries + 1, lambda number: stock_bounds(number - 1, least, most), None)
        return self._stock(f"no rule names it: Dramatiq's max_retries={retries}", attempts, complete=True)

    def _stock(self, why: str, attempts: tuple[Attempt, ...], *, complete: bool) -> Explanation:
        return Explanation(
            actor=self.actor.actor_name,
            exception=class_path(self.exception),
            outcome="retried",
            ending="dead",
            reason="exhausted",
            rule=None,
            why=why,
            attempts=attempts,
            complete=complete,
            longest_ms=self._longest(len(attempts), attempts[-1].latest_ms, None) if complete else None,
            where_it_ends=self._where("dead"),
        )

    def _retried(self, policy: RetryPolicy, rule_id: str, why: str, only_if: str | None = None) -> Explanation:
        limit = None if policy.max_elapsed is None else to_ms(policy.max_elapsed)
        attempts = _timeline(policy.attempts, lambda number: bounds_of(policy.wait, number), limit)
        ending = {"dead": "dead", "discard": "discarded", "alert": "alerted"}[policy.then]
        return Explanation(
            actor=self.actor.actor_name,
            exception=class_path(self.exception),
            outcome="retried" if len(attempts) > 1 else ending,
            ending=ending,
            reason="exhausted",
            rule=rule_id,
            why=why,
            only_if=only_if,
            attempts=attempts,
            longest_ms=self._longest(len(attempts), attempts[-1].latest_ms, limit),
            where_it_ends=self._where(ending),
        )

    def _longest(self, runs: int, waits_ms: int, limit_ms: int | None) -> int | None:
        timeout = self.policy.timeout_ms
        if timeout is None:
            return None
        # max_elapsed includes the time of the runs.
        whole = round(waits_ms + runs * timeout)
        return whole if limit_ms is None or runs == 1 else min(whole, round(limit_ms + 2 * timeout))

    def _where(self, ending: str) -> str:
        dead_letters = f"the dead letters of {self.actor.queue_name}"
        if ending == "discarded":
            keep = self.policy.dead_letter_discards
            return dead_letters if (self.classifier.dead_letter_discards if keep is None else keep) else "gone"
        if ending in ("deferred", "interrupted"):
            return f"the queue {self.actor.queue_name}"
        return dead_letters


def policy_of(actor: Actor[..., Any]) -> ActorPolicy:
    """Return an actor's resolved options.

    Raises:
      OperationError: The actor's broker has no dramatiq_policies.
    """
    policy = state_of(actor.broker).policies.get(actor.actor_name)
    if policy is None:
        raise OperationError(
            f"The actor {actor.actor_name!r} is on a broker without dramatiq_policies. Call "
            "install(broker) before you declare actors, or, in Django, list "
            "dramatiq_policies.ErrorClassifier in MIDDLEWARE of DRAMATIQ_BROKER."
        )
    return policy


def _timeline(runs: int, bounds: Any, limit_ms: int | None) -> tuple[Attempt, ...]:
    attempts = [Attempt(1, 0, 0)]
    earliest = latest = 0
    for number in range(1, min(runs, 1_000)):
        shortest, longest = bounds(number)
        earliest, latest = earliest + shortest, latest + longest
        if limit_ms is not None and earliest > limit_ms:
            break
        attempts.append(Attempt(number + 1, earliest, latest if limit_ms is None else min(latest, limit_ms)))
    return tuple(attempts)


def stock_bounds(retries: int, least: int, most: int) -> tuple[int, int]:
    """Return the shortest and longest wait of Dramatiq's ``compute_backoff``, in ms."""
    backoff = least * 2 ** min(retries, 32)
    if backoff > most:
        return int(most * 0.5), most
    return (backoff, 2 * backoff) if 2 * backoff <= most else (min(backoff, int(most * 0.5)), most)


def _why(rule: Rule, exception: type[BaseException]) -> str:
    target = rule.resolve()
    whose = "the actor's" if rule.owner == "actor" else "the broker's"
    named = (
        "names its class"
        if target is exception
        else f"names {_short(target)}, the nearest of its base classes with a rule"
    )
    return f"{whose} {rule.verb.value}_on {named}"


def _short(cls: type[Any]) -> str:
    return class_path(cls).removeprefix("builtins.")


def predicate_name(rule: Rule) -> str | None:
    """Return the name of a rule's predicate; a lambda's line."""
    if rule.predicate is None:
        return None
    predicate: Any = rule.predicate
    while isinstance(predicate, functools.partial):
        predicate = predicate.func
    code = getattr(predicate, "__code__", None)
    name = getattr(predicate, "__qualname__", type(predicate).__qualname__)
    return f"{name} (line {code.co_firstlineno})" if code is not None and "<lambda>" in name else str(name)
