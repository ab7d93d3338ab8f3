"""Check whether an actor is ready for production. Never connects."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dramatiq.middleware import AsyncIO

from ..._dramatiq import kind_of
from ...common.durations import declared_ms, format_duration, looks_like_seconds
from ...common.safe_logger import ALERTS, is_heard
from ...delivery.broker_state import state_of
from ...middleware.base import has_policies
from ...middleware.idempotency import Idempotency
from ...middleware.timeout import Timeout
from ...rules.rule import Verb
from .actor_source import purpose_of, source_of
from .broker_checks import OF_BROKERS, Found, seconds_found, wait_durations
from .checked_job import CheckedJob, Settings
from .composition_checks import check_composition
from .findings import CODES, Finding
from .rule_checks import check_horizon, check_rules, retry_horizon

if TYPE_CHECKING:
    from dramatiq import Actor
    from dramatiq.broker import Broker

__all__ = ["check_actor", "check_broker"]


def check_broker(broker: Broker, settings: Settings | None = None) -> list[Finding]:
    """Return all findings on a broker's actors and middleware, before exemptions."""
    settings = Settings() if settings is None else settings
    if not has_policies(broker):
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
    job = CheckedJob(actor, policy, state_of(actor.broker), settings)
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


def _design(job: CheckedJob) -> Found:
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


def _uncapped(job: CheckedJob) -> Found:
    classifier = job.classifier
    if classifier.unclassified is not None:
        return
    if job.options.get("retry_when", classifier.retry_when) is not None:
        yield "DP003", "retry_when decides on errors without a rule, and has no limit"
    elif job.options.get("max_retries", classifier.max_retries) is None:
        yield "DP003", "max_retries is None: errors without a rule are retried forever"


def _seconds(job: CheckedJob) -> Found:
    given = [(name, job.policy.declared.get(name)) for name in _DURATIONS]
    declared: list[tuple[str, Any]] = [(n, declared_ms(n, value)) for n, value in given if looks_like_seconds(n, value)]
    for rule in job.policy.rules.rules:
        if rule.owner == "actor" and rule.policy is not None:
            declared.append(("max_elapsed", rule.policy.max_elapsed))
            declared += wait_durations(rule.policy.wait)
    yield from seconds_found(declared)


def _memory(job: CheckedJob) -> Found:
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


def _references(job: CheckedJob) -> Found:
    for option in ("on_retry_exhausted", "on_failure", "on_success"):
        named = job.options.get(option)
        if isinstance(named, str) and named not in job.state.broker.actors:
            yield "DP014", f"{option}: there is no actor {named!r}"


def _clocks(job: CheckedJob) -> Found:
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


def _class_based(job: CheckedJob) -> Found:
    cls = type(inspect.unwrap(job.actor.fn))
    meta = vars(cls).get("Meta")
    if meta is None:
        return
    bases = [*meta.__mro__[1:], *(vars(base)["Meta"] for base in cls.__mro__[1:] if "Meta" in vars(base))]
    inherited = {name for base in bases if base is not object for name in vars(base) if not name.startswith("_")}
    lost = sorted(inherited - set(vars(meta)) - {"abstract", "actor"})
    if lost:
        yield "DP016", f"Meta lacks the inherited {', '.join(lost)}"


def _alerts(job: CheckedJob) -> Found:
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


def _asynchronous(job: CheckedJob) -> Found:
    fn: Any = inspect.unwrap(job.actor.fn)
    if inspect.iscoroutinefunction(fn) and job.one(AsyncIO) is None:
        yield "DP020", "The actor is a coroutine function, and the broker has no event loop to run it"


_OF_ACTORS: tuple[Callable[[CheckedJob], Found], ...] = (
    _design,
    check_horizon,
    _seconds,
    _memory,
    check_rules,
    _references,
    _clocks,
    _class_based,
    _alerts,
    _asynchronous,
)
