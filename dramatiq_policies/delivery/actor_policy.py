"""The options of one actor, checked at the declaration and resolved once for all messages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from ..common.callables import is_coroutine_callable, is_sync_callable
from ..common.durations import LikelySeconds
from ..errors import ConfigurationError, checked_duration, checked_wait
from ..rules.matching import RuleSet
from ..rules.parsing import parse_rules
from ..rules.rule import Rule

if TYPE_CHECKING:
    from dramatiq import Actor

    from ..interrupts import Runner

__all__ = ["ActorPolicy", "IdempotencyOptions", "checked_stock_options", "exception_classes", "expect_callable"]


class IdempotencyOptions:
    """An actor's options of idempotency, checked.

    Attributes:
      enabled: Whether the actor asks for any of them.
      keyed: Whether its messages have keys. Without keys only ``done_when`` and the count of crashes remain.
      key_of: Makes the key from the actor's arguments; None for the message id. The user's callable takes the arguments as the
        actor does, a template takes them as (args, kwargs).
      key_runs_no_user_code: Whether the key is known without a call of the user's code.
      key_runner: Runs the user's callable for the key; None for a template.
      job_with_done_when: Calls ``done_when``, and then the actor's function; None without ``done_when``.
      job_runner: Runs ``job_with_done_when``; None without ``done_when``.
      fingerprint: Makes the fingerprint of the arguments that the key leaves out; None if the key contains all of them.
      ttl: How long a completed key is remembered, in milliseconds.
      max_crashes: See `Idempotency`.
    """

    __slots__ = (
        "enabled",
        "fingerprint",
        "job_runner",
        "job_with_done_when",
        "key_of",
        "key_runner",
        "key_runs_no_user_code",
        "keyed",
        "max_crashes",
        "ttl",
    )

    enabled: bool
    keyed: bool
    key_runs_no_user_code: bool
    ttl: int
    max_crashes: int | None

    def __init__(self) -> None:
        self.key_of: Callable[..., Any] | None = None
        self.key_runner: Runner | None = None
        self.fingerprint: Callable[[Sequence[Any], Mapping[str, Any]], str] | None = None
        self.job_with_done_when: Callable[..., Any] | None = None
        self.job_runner: Runner | None = None


class ActorPolicy:
    """The resolved options of one actor.

    Attributes:
      actor_name: The actor's name.
      declared: The options as declared. In ``actor.options`` a ``timedelta`` for Dramatiq's middleware has become a number.
      rules: The rules for exceptions, the actor's and the broker's.
      max_attempts: The highest number of attempts of its rules; 0 if no rule retries.
      tags: Constant tags.
      after_discard: The actor's own hook.
      dead_letter_discards: Whether to keep discarded messages; None for the broker's setting.
      exempt: The reason for each ignored finding of ``dramatiq-policies check``.
      timeout, idempotency_defaults: The Timeout, and the defaults of Idempotency, at the time of resolving.
      idempotency: The idempotency options; None without Idempotency.
      timeout_ms, queue_timeout_ms: The timeouts; None for none.
      transactional: Whether a job runs in a transaction with the completion of its key.
    """

    __slots__ = (
        "actor_name",
        "after_discard",
        "dead_letter_discards",
        "declared",
        "exempt",
        "idempotency",
        "idempotency_defaults",
        "max_attempts",
        "options",
        "queue_timeout_ms",
        "rules",
        "tags",
        "timeout",
        "timeout_ms",
        "transactional",
    )

    def __init__(self, actor: Actor[..., Any], broker_rules: tuple[Rule, ...]) -> None:
        where = f"actor {actor.actor_name!r}"
        options = actor.options
        self.actor_name = actor.actor_name
        self.options = options
        own = parse_rules(
            where,
            "actor",
            retry_on=options.get("retry_on"),
            discard_on=options.get("discard_on"),
            alert_on=options.get("alert_on"),
        )
        use_broker_rules = options.get("broker_rules", True)
        _expect_bool(where, "broker_rules", use_broker_rules)
        self.rules = RuleSet(own, broker_rules if use_broker_rules else ())
        self.max_attempts = self.rules.max_attempts
        self.tags = _strings(where, "tags", options.get("tags"))
        self.exempt = _strings(where, "policy_exempt", options.get("policy_exempt")) or {}
        if not all(reason.strip() for reason in self.exempt.values()):
            raise ConfigurationError.of_option(where, "policy_exempt", "a reason for each code", self.exempt)
        self.after_discard = options.get("after_discard")
        for option, takes in (("after_discard", "message, exception"), ("retry_when", "retries, exception")):
            if options.get(option) is not None:
                expect_callable(where, option, options[option], takes)
        self.declared = dict(options)
        for option, value in checked_stock_options(where, options).items():
            # Results gives its ttl to Redis, and hiredis refuses a subclass of int.
            options[option] = int(value) if isinstance(value, LikelySeconds) else value
        self.dead_letter_discards: bool | None = options.get("dead_letter_discards")
        if self.dead_letter_discards is not None:
            _expect_bool(where, "dead_letter_discards", self.dead_letter_discards)
        _expect_bool(where, "outbox", options.get("outbox", True))
        self.transactional: bool = options.get("transactional", False)
        _expect_bool(where, "transactional", self.transactional)
        throws = options.get("throws")
        if throws is not None:
            options["throws"] = exception_classes(where, "throws", throws)
        self.timeout: object = None
        self.idempotency: IdempotencyOptions | None = None
        self.idempotency_defaults: object = None
        self.timeout_ms: float | None = None
        self.queue_timeout_ms: float | None = None


def expect_callable(where: str, option: str, value: object, takes: str) -> None:
    """Raise unless ``value`` is a plain function of the arguments named in ``takes``; coroutine and generator functions are not."""
    if not is_sync_callable(value, len(takes.split(", "))):
        asynchronous = callable(value) and is_coroutine_callable(value)
        do = "A coroutine function is never awaited here" if asynchronous else ""
        raise ConfigurationError.of_option(where, option, f"a plain callable({takes})", value, do)


_STOCK_DURATIONS: tuple[tuple[str, Callable[[str, str, Any], int]], ...] = (
    ("min_backoff", checked_wait),
    ("max_backoff", checked_wait),
    ("max_age", checked_duration),
    ("result_ttl", partial(checked_duration, least=1)),
)


def checked_stock_options(where: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Check Dramatiq's options on retries, age, results and callbacks; return those given, a ``timedelta`` as milliseconds.

    Dramatiq reads them only after a job has failed, and a wrong value would then lose the decision.

    Raises:
      ConfigurationError: An option is wrong.
    """
    checked: dict[str, Any] = {}
    for option, check in _STOCK_DURATIONS:
        value = options.get(option)
        if option in options and not (value is None and option in ("max_age", "result_ttl")):
            ms = check(where, option, value)
            checked[option] = ms if isinstance(value, timedelta) or isinstance(ms, LikelySeconds) else value
    retries = options.get("max_retries")
    endless = isinstance(retries, float) and retries == math.inf
    if isinstance(retries, bool) or not (retries is None or endless or isinstance(retries, int)):
        raise ConfigurationError.of_option(where, "max_retries", "an int, or None for no bound", retries)
    for option in ("on_success", "on_failure", "on_retry_exhausted"):
        value = options.get(option)
        # Dramatiq takes an actor in the options of a message, and looks for a name in those of an actor.
        name = getattr(getattr(value, "__actor__", value), "actor_name", value)
        if not (name is None or isinstance(name, str)):
            raise ConfigurationError.of_option(where, option, "an actor or its name", value)
        if name is not value:
            checked[option] = name
    return checked


def exception_classes(where: str, option: str, value: object) -> tuple[type[BaseException], ...]:
    """Return a class, or an iterable of classes, as a tuple for ``isinstance``."""
    classes = (value,) if isinstance(value, type) else value
    if isinstance(classes, (list, set, frozenset)):
        classes = tuple(classes)
    if not isinstance(classes, tuple) or not all(isinstance(c, type) and issubclass(c, BaseException) for c in classes):
        raise ConfigurationError.of_option(where, option, "an exception class or a tuple of them", value)
    return classes


def _expect_bool(where: str, option: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigurationError.of_option(where, option, "True or False", value)


def _strings(where: str, option: str, value: object) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(k, str) and isinstance(v, str) for k, v in value.items()):
        raise ConfigurationError.of_option(where, option, "a mapping of strings to strings", value)
    return dict(value)
