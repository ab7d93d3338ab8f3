"""Idempotency keys: from a template or a callable over what the actor was called with."""

from __future__ import annotations

import inspect
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .errors import ConfigurationError
from .texts import encodable

__all__ = ["checked_key", "encodable", "roots_of", "signature_of", "template_key"]

_NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def signature_of(fn: Any) -> inspect.Signature:
    """What an actor takes: for a class-based one, what its ``perform`` takes.

    Raises:
      TypeError, ValueError: Its function does not say: some that are written in C.
    """
    inner = inspect.unwrap(fn)
    return inspect.signature(getattr(inner, "perform", fn))


def template_key(
    where: str, template: str, signature: inspect.Signature
) -> Callable[[Sequence[Any], Mapping[str, Any]], str]:
    """The key that a template makes of what an actor with this signature is called with.

    Raises:
      ConfigurationError: It is no template, or names what the actor does not take.
    """
    option = "idempotency_key"
    try:
        roots = set(roots_of(template))
    except ValueError as error:
        raise ConfigurationError.of_option(where, option, f"a template ({error})", template) from None
    parameters = signature.parameters.values()
    known = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    if not roots <= known:
        expected = f"a template over the actor's arguments {sorted(known)}"
        raise ConfigurationError.of_option(where, option, expected, template, "Mend the field's name")
    if not roots and signature.parameters:
        raise ConfigurationError.of_option(
            where, option, "a template with at least one field", template, "Every call would have the same key"
        )
    if not template:
        raise ConfigurationError.of_option(where, option, "a key that is not empty", template)
    names = tuple(p.name for p in parameters if p.kind in _NAMED)
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    plain = len(names) == len(signature.parameters)
    format_it = template.format_map

    def key(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        if plain and len(args) <= len(names):
            values = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
            if roots <= values.keys():
                return format_it(values)
        # Slower, and raises what a wrong call raises.
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return format_it(bound.arguments)

    return key


def roots_of(template: str) -> Iterator[str]:
    """The arguments that a template names, also in a field's format."""
    for _, field, form, _ in string.Formatter().parse(template):
        if field is not None:
            yield field.partition(".")[0].partition("[")[0]
            yield from roots_of(form or "")


def checked_key(key: Any) -> str:
    """What a callable or a message gave as a key.

    Raises:
      TypeError: It is none.
    """
    if (isinstance(key, str) and key) or type(key) is int:
        return str(key)
    # Made of the arguments: what it is does not belong into a log.
    got = "an empty one" if key == "" else f"a {type(key).__name__}"
    raise TypeError(f"idempotency_key: expected a non-empty str or an int, got {got}")
