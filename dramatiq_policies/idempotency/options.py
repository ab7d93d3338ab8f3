"""The idempotency options of an actor, checked at the declaration, and the key of a message."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dramatiq.asyncio import async_to_sync
from dramatiq.middleware import SkipMessage

from ..common.callables import (
    accepts_call_of,
    is_coroutine_callable,
    returns_coroutine_or_generator,
    stated_signature,
    unwrapped,
)
from ..common.durations import CENTURY_MS, WEEK_MS
from ..delivery.actor_policy import IdempotencyOptions
from ..errors import ConfigurationError, checked_duration, how_to_add
from ..interrupts import coroutines, runner_for
from ..rules.matching import RuleSet
from ..rules.wait import bounds_of
from .fingerprint import covers_all, fingerprint_of
from .keys import TypedKey, checked_key, encodable, signature_of, template_key, text_key, typed_name

if TYPE_CHECKING:
    from dramatiq import Actor, Message

__all__ = [
    "OPTIONS",
    "AlreadyDone",
    "IdempotencyOptions",
    "Register",
    "checked_crashes",
    "crash_counter_name",
    "key_of",
    "register_of",
    "resolve_idempotency",
    "without_store",
]

#: The actor options of idempotency.
OPTIONS = ("idempotent", "idempotency_key", "done_when", "idempotency_ttl", "max_crashes")


class AlreadyDone(SkipMessage):
    """``done_when`` returned True: the work is already done."""


def crash_counter_name(message_id: str) -> str:
    """Name the register that counts the starts of a message without a key."""
    return encodable(f"\0{message_id}")


class Register(NamedTuple):
    """The register of a key in the store.

    Attributes:
      name: The name of the register.
      earlier: The name in version 0.1.0; None if the names are the same.
    """

    name: str
    earlier: str | None = None


def register_of(actor_name: str, key: str, scope: Sequence[str] = ()) -> Register:
    """Return the register of an actor's key, with its name in 0.1.0.

    Parameters:
      scope: Separates the services that share the store; empty if the store's namespace does.
    """
    if type(key) is not TypedKey and not scope:
        return Register(encodable(f"{actor_name}\0{key}"))
    parts = key.parts if type(key) is TypedKey else (("k", key),)
    name = typed_name(*(("@", text) for text in scope), ("a", actor_name), *parts)
    return Register(name, encodable(f"{actor_name}\0{key}"))


def key_of(message: Message[Any], options: IdempotencyOptions, call: Callable[[Any], Any] | None = None) -> str | None:
    """Return the key of a message: the message's own key, or the actor's key for the arguments; None without a key.

    Parameters:
      call: Calls the user's key callable with the actor's arguments.
    """
    own = message.options.get("idempotency_key")
    if own is not None:
        return checked_key(own)
    if not options.keyed:
        return None
    if options.key_of is None:
        return text_key(message.message_id)
    if options.key_runner is not None and call is not None:
        return checked_key(call(options.key_of))
    key: str = options.key_of(message.args, message.kwargs)
    return key or checked_key(key)


def resolve_idempotency(
    where: str, actor: Actor[..., Any], rules: RuleSet, defaults: tuple[int, int | None] | None
) -> IdempotencyOptions | None:
    """Check an actor's idempotency options.

    Parameters:
      defaults: The broker's ttl and max_crashes; None if the broker has no Idempotency with a store.

    Raises:
      ConfigurationError: An option is invalid, or the broker has no Idempotency with a store.
    """
    options = actor.options
    if defaults is None:
        _refuse_any(where, options)
        return None
    idempotent = options.get("idempotent")
    if not (idempotent is None or isinstance(idempotent, bool)):
        raise ConfigurationError.of_option(where, "idempotent", "True or False", idempotent)
    fn: Any = unwrapped(actor.fn)
    given, done_when = options.get("idempotency_key"), options.get("done_when")
    takes = None if given is None and done_when is None else _signature_of(fn)
    resolved = IdempotencyOptions()
    if given is not None:
        _resolve_key(where, resolved, given, fn, takes)
    resolved.keyed = bool(idempotent) or given is not None
    resolved.key_runs_no_user_code = resolved.keyed and resolved.key_runner is None
    resolved.enabled = resolved.keyed or done_when is not None
    if done_when is not None:
        _check_callable(where, "done_when", "a callable", done_when, fn, takes)
        resolved.job_with_done_when = _with_done_when(fn, done_when)
        resolved.job_runner = runner_for(resolved.job_with_done_when)
    ttl, max_crashes = defaults
    declared = options.get("idempotency_ttl")
    if declared is not None:
        ttl = checked_duration(where, "idempotency_ttl", declared, least=1, most=CENTURY_MS)
    resolved.ttl = int(max(ttl, _longest_wait(rules)))
    if "max_crashes" in options:
        max_crashes = checked_crashes(where, options["max_crashes"])
    resolved.max_crashes = max_crashes
    return resolved


def _resolve_key(
    where: str, resolved: IdempotencyOptions, given: Any, fn: Any, takes: inspect.Signature | None
) -> None:
    """Resolve ``idempotency_key``, a template or a callable. ``takes`` is the signature of the actor; None if unknown."""
    option = "idempotency_key"
    if not isinstance(given, str):
        _check_callable(where, option, "a template or a callable", given, fn, takes)
        resolved.key_of = async_to_sync(given) if is_coroutine_callable(given) else given
        resolved.key_runner = runner_for(resolved.key_of)
        resolved.fingerprint = fingerprint_of(takes)
        return
    if takes is None:
        raise ConfigurationError.of_option(where, option, "a callable: the actor has no readable signature", given)
    resolved.key_of = template_key(where, given, takes)
    if not covers_all(given, takes):
        resolved.fingerprint = fingerprint_of(takes)


def _refuse_any(where: str, options: Mapping[str, Any]) -> None:
    for name in OPTIONS:
        value = options.get(name)
        # Not by equality: 0 equals False but is a value.
        if not (value is None or value is False):
            raise without_store(f"{where}: {name}")


def without_store(where: str) -> ConfigurationError:
    """Return an error for a call or an option that needs a store."""
    add = how_to_add(
        "Idempotency(RedisStore.from_url(…))",
        "on RabbitMQ install(broker, idempotency=Idempotency(RedisStore.from_url(…)))",
    )
    return ConfigurationError(f"{where}: the broker has no Idempotency with a store. {add}.")


def checked_crashes(where: str, value: object) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ConfigurationError.of_option(where, "max_crashes", "an int of at least 1, or None", value)
    return value


def _longest_wait(rules: RuleSet) -> int:
    """Return the longest wait between two runs under the retry rules, in milliseconds."""
    longest = 0
    for policy in rules.retry_policies():
        bounds = [bounds_of(policy.wait, attempt)[1] for attempt in range(1, min(policy.attempts, 100))]
        longest = max([longest, *bounds])
    return min(longest, WEEK_MS)


def _signature_of(fn: Any) -> inspect.Signature | None:
    """Return the actor's signature; None if the function has none."""
    try:
        return signature_of(fn)
    except (TypeError, ValueError):
        return None


def _is_decorated(fn: Any) -> bool:
    return hasattr(fn.__wrapped__ if coroutines.is_async(fn) else fn, "__wrapped__")


def _check_callable(
    where: str, option: str, expected: str, given: object, fn: Any, takes: inspect.Signature | None
) -> None:
    """Check that a callable takes the actor's arguments. ``takes`` is the actor's signature; None if unknown."""
    if not callable(given):
        raise ConfigurationError.of_option(where, option, expected, given)
    if returns_coroutine_or_generator(given) and not (is_coroutine_callable(given) and coroutines.is_async(fn)):
        raise ConfigurationError.of_option(
            where,
            option,
            "a plain function",
            given,
            "A coroutine function works on an async actor only, a generator nowhere",
        )
    # A decorator may take other arguments than the wrapped function.
    if takes is not None and not _is_decorated(fn) and not accepts_call_of(given, takes):
        raise ConfigurationError.of_option(
            where,
            option,
            f"a callable with the parameters of the actor, {takes}",
            given,
            f"The callable takes {stated_signature(given)}; give it the actor's parameters",
        )


def _with_done_when(fn: Any, done_when: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a job so that ``done_when`` runs first: within the timeout, and on the event loop of an async actor."""
    if coroutines.is_async(fn):
        coroutine = fn.__wrapped__

        @functools.wraps(coroutine)
        async def ask_and_run(*args: Any, **kwargs: Any) -> Any:
            done = done_when(*args, **kwargs)
            if inspect.isawaitable(done):
                done = await done
            if done:
                raise AlreadyDone
            return await coroutine(*args, **kwargs)

        return async_to_sync(ask_and_run)

    def run(*args: Any, **kwargs: Any) -> Any:
        if done_when(*args, **kwargs):
            raise AlreadyDone
        return fn(*args, **kwargs)

    return run
