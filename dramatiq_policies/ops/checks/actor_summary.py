"""An actor's whole policy, in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ...common.durations import format_duration, to_ms
from ...outcomes import class_path
from ..explanations.explanation import policy_of, predicate_name, unnamed
from .actor_source import purpose_of, source_of

if TYPE_CHECKING:
    from dramatiq import Actor

    from ...delivery.actor_policy import ActorPolicy

__all__ = ["ActorSummary", "describe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorSummary:
    """An actor's whole policy.

    Attributes:
      actor, queue, purpose, file, line: The actor and the place of its declaration.
      facts: The values of its options in words, by name.
      rules: A row for each rule: verb, error, only_if, attempts, wait, then, owner.
    """

    actor: str
    queue: str
    purpose: str | None
    file: str | None
    line: int | None
    facts: dict[str, str]
    rules: tuple[dict[str, Any], ...]

    def asdict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def describe(actor: Actor[..., Any]) -> ActorSummary:
    """An actor's whole policy.

    Raises:
      OperationError: The actor's broker has no dramatiq_policies.
    """
    policy = policy_of(actor)
    file, line = source_of(actor)
    rules = []
    for rule in policy.rules.rules:
        retry = rule.policy
        rules.append(
            {
                "verb": rule.verb.value,
                "error": rule.target if isinstance(rule.target, str) else class_path(rule.target),
                "only_if": predicate_name(rule),
                "attempts": None if retry is None else retry.attempts,
                "wait": None if retry is None else repr(retry.wait),
                "max_elapsed_ms": None if retry is None or retry.max_elapsed is None else to_ms(retry.max_elapsed),
                "then": None if retry is None else retry.then,
                "owner": rule.owner,
            }
        )
    return ActorSummary(
        actor=actor.actor_name,
        queue=actor.queue_name,
        purpose=(purpose_of(actor) or "").strip().partition("\n")[0] or None,
        file=file,
        line=line,
        facts=_facts(actor, policy),
        rules=tuple(rules),
    )


def _facts(actor: Actor[..., Any], policy: ActorPolicy) -> dict[str, str]:
    facts = {
        "timeout": _duration_or(policy.timeout_ms, "none: a run may last forever"),
        "queue_timeout": _duration_or(policy.queue_timeout_ms, "none: a message may wait forever"),
        "other errors": unnamed(actor).why,
    }
    for option in ("max_retries", "idempotency_key", "idempotent", "done_when"):
        if option in actor.options:
            value = actor.options[option]
            facts[option] = getattr(value, "__qualname__", None) or str(value)
    if policy.tags:
        facts["tags"] = ", ".join(f"{name}={value}" for name, value in policy.tags.items())
    if policy.exempt:
        facts["exempt"] = "; ".join(f"{code}: {reason}" for code, reason in policy.exempt.items())
    facts["a duplicate"], facts["a crash"] = _rerun_facts(actor, policy)
    return facts


def _rerun_facts(actor: Actor[..., Any], policy: ActorPolicy) -> tuple[str, str]:
    """Describe a second message of the same job, and a crash of the worker during a job."""
    keys = policy.idempotency
    again = "the message is redelivered and the job runs again from the start"
    crash = (
        again
        if keys is None or keys.max_crashes is None
        else f"{again}; dead (crashed) after {keys.max_crashes} such runs"
    )
    if keys is not None and keys.keyed:
        kept = f"skipped for {format_duration(keys.ttl)} after the job has completed, deferred while it runs"
        return (kept if keys.key_of is not None else f"{kept}; a duplicate is only the same message id"), crash
    if "done_when" in actor.options:
        return "runs, unless done_when returns true", crash
    return "runs again: no option of the actor prevents the second run", crash


def _duration_or(ms: float | None, none: str) -> str:
    return none if ms is None else format_duration(ms)
