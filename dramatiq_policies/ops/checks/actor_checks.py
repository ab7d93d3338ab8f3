"""Check whether an actor is ready for production. Never connects."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from dramatiq.middleware import AsyncIO

from ..._dramatiq import kind_of
from ...common.durations import declared_ms, format_duration, looks_like_seconds, to_ms
from ...common.plurals import counted
from ...common.safe_logger import ALERTS, is_heard
from ...delivery.broker_state import BrokerState, state_of
from ...errors import ConfigurationError
from ...middleware.base import PolicyMiddleware
from ...middleware.error_classifier import ErrorClassifier
from ...middleware.idempotency import Idempotency
from ...middleware.timeout import Timeout
from ...outcomes import class_path
from ...rules.backoff import bounds_of
from ...rules.rule import RetryPolicy, Rule, Verb
from ..explanations.explanation import unnamed
from .actor_source import purpose_of, source_of
from .broker_checks import OF_BROKERS, Found, named, seconds_found, wait_durations
from .composition_checks import check_composition
from .findings import CODES, Finding

if TYPE_CHECKING:
    from dramatiq import Actor
    from dramatiq.broker import Broker

    from ...delivery.actor_policy import ActorPolicy

__all__ = ["Settings", "check_actor", "check_broker", "retry_horizon"]


M = TypeVar("M")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of the check outside of the application.

    Attributes:
      required_tags: The tags to require of every actor.
      shutdown_timeout_ms: The value of ``dramatiq --worker-shutdown-timeout``. Default: ten minutes, as Dramatiq's.
      consumer_timeout_ms: RabbitMQ's ``consumer_timeout``. Default: half an hour, as RabbitMQ's.
    """

    required_tags: tuple[str, ...] = ()
    shutdown_timeout_ms: int = 600_000
    consumer_timeout_ms: int = 1_800_000


@dataclass(slots=True)
class _Job:
    """An actor, the policy and the broker's state."""

    actor: Actor[..., Any]
    policy: ActorPolicy
    state: BrokerState
    settings: Settings
    options: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.options = self.actor.options

    @property
    def classifier(self) -> ErrorClassifier:
        """The broker's ErrorClassifier. `order_middleware` adds one if necessary."""
        found = self.one(ErrorClassifier)
        assert found is not None
        return found

    def one(self, kind: type[M]) -> M | None:
        return next((middleware for middleware in self.state.broker.middleware if isinstance(middleware, kind)), None)

    def named(self, name: str) -> Any:
        """Find a middleware by class name, without importing its module."""
        return named(self.state.broker, name)


def check_broker(broker: Broker, settings: Settings | None = None) -> list[Finding]:
    """Return all findings on a broker's actors and middleware, before exemptions."""
    settings = Settings() if settings is None else settings
    if not any(isinstance(middleware, PolicyMiddleware) for middleware in broker.middleware):
        return [_finding("DP022", None, f"The {type(broker).__name__} has no middleware of dramatiq_policies")]
    found = [_finding(code, None, text) for check in OF_BROKERS for code, text in check(broker)]
    for name in sorted(broker.actors):
        found += check_actor(broker.actors[name], settings)
    found += [_finding(code, broker.actors.get(name or ""), text) for name, code, text in check_composition(broker)]
    return found


def check_actor(actor: Actor[..., Any], settings: Settings | None = None) -> list[Finding]:
    """Return all findings on an actor, before exemptions."""
    settings = Settings() if settings is None else settings
    policy = state_of(actor.broker).policies.get(actor.actor_name)
    if policy is None:
        return [_finding("DP022", actor, "The actor was declared on a broker without dramatiq_policies")]
    job = _Job(actor, policy, state_of(actor.broker), settings)
    return [_finding(code, actor, text) for check in _OF_ACTORS for code, text in check(job)]


def _finding(code: str, actor: Actor[..., Any] | None, text: str) -> Finding:
    file, line = (None, None) if actor is None else source_of(actor)
    return Finding(
        code=code,
        severity=CODES[code].severity,
        actor=None if actor is None else actor.actor_name,
        message=text,
        fix=CODES[code].fix,
        file=file,
        line=line,
    )


def _design(job: _Job) -> Found:
    declared = {rule.verb for rule in job.policy.rules.rules}
    if Verb.RETRY not in declared and "retry_on" not in job.options:
        yield "DP001", "No retry_on names the transient errors"
    if Verb.DISCARD not in declared and "discard_on" not in job.options:
        yield "DP002", "No discard_on names the permanent errors"
    yield from _uncapped(job)
    timeout = job.one(Timeout)
    if job.policy.timeout_ms is None:
        yield "DP004", "A run has no time limit"
    elif (
        job.options.get("timeout") is None
        and job.options.get("time_limit") is None
        and timeout is not None
        and not timeout.is_explicit
    ):
        yield "DP004", "Only the default timeout of ten minutes applies; nobody chose a timeout"
    if job.actor.queue_name == "default":
        yield "DP005", "The actor shares the queue 'default' with all actors without a queue"
    if not any(job.options.get(option) for option in ("idempotency_key", "idempotent", "done_when")):
        yield "DP006", "The broker may deliver a message twice, and nothing prevents the second run"
    if not purpose_of(job.actor):
        yield "DP007", "The actor has no docstring"
    for tag in job.settings.required_tags:
        if tag not in (job.policy.tags or {}):
            yield "DP008", f"The actor has no tag {tag!r}"


def _uncapped(job: _Job) -> Found:
    classifier = job.classifier
    if classifier.unclassified is not None:
        return
    if job.options.get("retry_when", classifier.retry_when) is not None:
        yield "DP003", "retry_when decides on errors without a rule, and has no limit"
    elif job.options.get("max_retries", classifier.max_retries) is None:
        yield "DP003", "max_retries is None: errors without a rule are retried forever"


def _horizon(job: _Job) -> Found:
    for rule in job.policy.rules.rules:
        if rule.policy is not None and (longest := retry_horizon(rule.policy)) > _DAY:
            yield "DP026", f"The rule for {_target(rule)} gives up after up to {format_duration(longest)}"
    other = unnamed(job.actor)
    if other.outcome == "retried" and other.complete and other.attempts[-1].latest_ms > _DAY:
        runs, latest = len(other.attempts), format_duration(other.attempts[-1].latest_ms)
        yield "DP026", f"After an error without a rule the job runs up to {counted(runs, 'time')}, over up to {latest}"


def _seconds(job: _Job) -> Found:
    given = [(name, job.options.get(name)) for name in _DURATIONS]
    declared: list[tuple[str, Any]] = [(n, declared_ms(n, value)) for n, value in given if looks_like_seconds(n, value)]
    for rule in job.policy.rules.rules:
        if rule.owner == "actor" and rule.policy is not None:
            declared.append(("max_elapsed", rule.policy.max_elapsed))
            declared += wait_durations(rule.policy.wait)
    yield from seconds_found(declared)


def _memory(job: _Job) -> Found:
    idempotency, keys, timeout = job.one(Idempotency), job.policy.idempotency, job.policy.timeout_ms
    if idempotency is None or keys is None or not keys.keyed:
        return
    # The lease is renewed while the job runs, but not during a call that blocks all other threads.
    if timeout is not None and idempotency.lease < min(timeout, _LEASE):
        yield "DP009", f"The lease is {format_duration(idempotency.lease)}, the timeout {format_duration(timeout)}"
    horizon = max((retry_horizon(rule.policy) for rule in job.policy.rules.rules if rule.policy), default=0)
    if keys.ttl < horizon:
        lasts, kept = format_duration(horizon), format_duration(keys.ttl)
        yield "DP010", f"Retries may go on for {lasts}, and the record of a completed key is kept for {kept}"


#: The options of an actor that are durations.
_DURATIONS = (
    *("timeout", "time_limit", "queue_timeout", "idempotency_ttl"),
    *("min_backoff", "max_backoff", "max_age", "result_ttl"),
)
#: The default lease of Idempotency, in ms.
_LEASE = 60_000
_DAY = 86_400_000


def retry_horizon(policy: RetryPolicy) -> int:
    """Return the longest time from a rule's first failure to the start of its last attempt, without the time of the
    runs."""
    longest = sum(bounds_of(policy.wait, number)[1] for number in range(1, min(policy.attempts, 10_000)))
    return longest if policy.max_elapsed is None else min(longest, to_ms(policy.max_elapsed))


def _rules(job: _Job) -> Found:
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


def _overridden(job: _Job, rule: Any) -> bool:
    """Whether the actor intentionally replaces a broker's rule by a rule for the same class."""
    return any(own.owner == "actor" and own.resolve() is rule.resolve() for own in job.policy.rules.rules)


def _target(rule: Any) -> str:
    return rule.target if isinstance(rule.target, str) else class_path(rule.target).removeprefix("builtins.")


def _references(job: _Job) -> Found:
    for option in ("on_retry_exhausted", "on_failure", "on_success"):
        named = job.options.get(option)
        if isinstance(named, str) and named not in job.state.broker.actors:
            yield "DP014", f"{option}: there is no actor {named!r}"


def _clocks(job: _Job) -> Found:
    timeout = job.policy.timeout_ms
    if timeout is None or not math.isfinite(timeout):
        return
    settings, lasts = job.settings, format_duration(timeout)
    if timeout > settings.shutdown_timeout_ms:
        yield (
            "DP015",
            (
                f"The job may run for {lasts}; a worker waits for "
                f"{format_duration(settings.shutdown_timeout_ms)} at its shutdown"
            ),
        )
    if kind_of(job.state.broker) == "rabbitmq" and timeout > settings.consumer_timeout_ms:
        yield (
            "DP017",
            (
                f"The job may run for {lasts}; after {format_duration(settings.consumer_timeout_ms)} "
                "RabbitMQ closes the channel and redelivers the message to another worker"
            ),
        )


def _class_based(job: _Job) -> Found:
    cls = type(inspect.unwrap(job.actor.fn))
    meta = vars(cls).get("Meta")
    if meta is None:
        return
    bases = [*meta.__mro__[1:], *(vars(base)["Meta"] for base in cls.__mro__[1:] if "Meta" in vars(base))]
    inherited = {name for base in bases if base is not object for name in vars(base) if not name.startswith("_")}
    lost = sorted(inherited - set(vars(meta)) - {"abstract", "actor"})
    if lost:
        yield "DP016", f"Meta lacks the inherited {', '.join(lost)}"


def _alerts(job: _Job) -> Found:
    rules = job.policy.rules.rules
    if not any(rule.verb is Verb.ALERT or (rule.policy is not None and rule.policy.then == "alert") for rule in rules):
        return
    classifier = job.classifier
    heard = (
        classifier.subscribers or classifier.after_discard or job.policy.after_discard or job.named("SentryReporter")
    )
    if not heard and not is_heard(ALERTS, logging.CRITICAL):
        yield (
            "DP018",
            "A rule alerts, but there is no SentryReporter, on_outcome, after_discard or log handler for the alert",
        )


def _asynchronous(job: _Job) -> Found:
    fn: Any = inspect.unwrap(job.actor.fn)
    if inspect.iscoroutinefunction(fn) and job.one(AsyncIO) is None:
        yield "DP020", "The actor is a coroutine function, and the broker has no event loop to run it"


_OF_ACTORS: tuple[Callable[[_Job], Found], ...] = (
    _design,
    _horizon,
    _seconds,
    _memory,
    _rules,
    _references,
    _clocks,
    _class_based,
    _alerts,
    _asynchronous,
)
