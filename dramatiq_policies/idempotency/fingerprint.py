"""Fingerprints of arguments: tell a duplicate with other arguments than those of the first message.

A key made from all arguments needs no fingerprint. Every other key has one of four bytes, in the record of the key: the arguments
themselves never reach the store or a log.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from inspect import Parameter, Signature
from string import Formatter
from typing import Any

__all__ = ["Fingerprint", "covers_all", "fingerprint_of"]

#: Makes the fingerprint of a call, 8 hexadecimal digits; "" if the arguments have none.
Fingerprint = Callable[[Sequence[Any], Mapping[str, Any]], str]

# json.dumps() would create an encoder in each call.
_encode = json.JSONEncoder(separators=(",", ":"), sort_keys=True).encode
_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_VARIABLE = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
#: Types of values that have the same ``repr`` in every process.
_PLAIN = frozenset({str, int, float, bool, type(None)})


def covers_all(template: str, signature: Signature) -> bool:
    """Return whether a key template contains every argument of the actor as a whole."""
    whole = {field for _, field, form, conversion in Formatter().parse(template) if field and not (form or conversion)}
    parameters = signature.parameters.values()
    return whole >= {p.name for p in parameters} and not any(p.kind in _VARIABLE for p in parameters)


def fingerprint_of(signature: Signature | None) -> Fingerprint:
    """Return the fingerprint function of an actor.

    The same call has one fingerprint, whether its arguments are named, positional or left to their defaults.
    """
    parameters = () if signature is None else signature.parameters.values()
    positional = tuple(p.name for p in parameters if p.kind in _POSITIONAL)
    # All names, so that every call has them in the order of the signature.
    defaults = {p.name: None if p.default is p.empty else p.default for p in parameters if p.kind not in _VARIABLE}
    return partial(_fingerprint, positional, defaults)


def _fingerprint(
    positional: tuple[str, ...], defaults: dict[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> str:
    named = {**defaults, **dict(zip(positional, args, strict=False)), **kwargs}
    others = args[len(positional) :]
    if not others and len(named) == len(defaults) and _PLAIN.issuperset(map(type, named.values())):
        # The usual arguments. An encoder takes twice as long.
        text = repr(named)
    else:
        try:
            text = _encode([named, others])
        except Exception:  # Values of an encoder of the user's, or a sequence without end.
            return ""
    return blake2b(text.encode(errors="surrogatepass"), digest_size=4).hexdigest()
