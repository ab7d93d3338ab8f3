"""Mask passwords in errors and log records: known values, passwords in URLs, and values of names such as ``password=``."""

from __future__ import annotations

import enum
import functools
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import date, datetime, timedelta
from types import MemberDescriptorType
from typing import Any

__all__ = ["is_path", "is_secret_name", "learn_passwords", "redact", "redacted_repr"]

_MASK = "***"
#: Not masked: the default password of RabbitMQ, and passwords of fewer than three characters, which every text contains.
_NO_SECRETS = frozenset({"guest"})
_LEAST = 3

_NAMES = (
    r"(?:password|passwd|passphrase|secret|api[_-]?key|access[_-]?key|private[_-]?key|credentials?|authorization|"
    r"(?:access|auth|bearer|refresh|api)[_-]?token)"
)
#: Each secret name contains one of these. A substring search is far cheaper than the pattern.
_HINTS = ("pass", "secret", "key", "credential", "authorization", "token")
_IS_SECRET = re.compile(_NAMES, re.IGNORECASE)
_QUOTED = r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'"
_NAMED = re.compile(
    rf"(?P<name>{_NAMES}\b[\"']?\s*(?:=|:(?!//))\s*)(?P<value>b?(?:{_QUOTED})|[^\s,;&)}}\]>\"']+)", re.IGNORECASE
)
#: Before a name: an exception's class such as MissingCredentials; its text is not secret.
_MISSING = re.compile(r"\b(?:Missing|No)(?:[A-Z]\w*)?$")
#: ``user:password@`` of a URL. An unquoted password may contain slashes, quotes, blanks and ``@``. A possible port is not a
#: password. A password ends at the last ``@`` of its word, or of the first word with an ``@``.
_IN_URL = re.compile(
    r"(?<=://)(?:"
    r"(?:[^\s/:@]+:(?!\d{1,5}(?:[/?#\s'\"),.;]|$))|:)(?:(?!://)[^@\n])*@(?:(?:(?!://)\S)*@)?"
    r"|(?:(?!://)[^/\s])*@"
    r")"
)
_PORT = re.compile(r"(?<=Port could not be cast to integer value as )(?:'.*'|\".*\")")

#: Attributes of brokers, stores, backends, redis-py clients and pika parameters that lead to a password.
_HOLDERS = (
    *("client", "connection_pool", "connection_kwargs", "sentinel_manager", "sentinel_kwargs", "sentinels"),
    *("nodes_manager", "parameters", "credentials", "store", "backend"),
)

_known: frozenset[str] = frozenset()
_pattern: re.Pattern[str] | None = None


def redact(text: str) -> str:
    """Mask the passwords in a text: known passwords, passwords in URLs, and values of names such as ``password=``."""
    if _pattern is not None:
        text = _pattern.sub(_MASK, text)
    if "://" in text:
        text = _IN_URL.sub(f"{_MASK}@", text)
    if "Port could not be cast" in text:
        text = _PORT.sub(_MASK, text)
    lowered = text.lower()
    if any(hint in lowered for hint in _HINTS):
        text = _NAMED.sub(_mask_value, text)
    return text


def _mask_value(found: re.Match[str]) -> str:
    value = found["value"]
    if value in ("None", "True", "False", "''", '""') or value.startswith("<"):
        return found[0]
    if _MISSING.search(found.string, max(0, found.start() - 80), found.start()) and "=" not in found["name"]:
        return found[0]
    mark = value[-1] if value[-1] in "\"'" else ""
    return f"{found['name']}{mark}{_MASK}{mark}"


def is_secret_name(name: object) -> bool:
    """Return whether an argument of this name holds a secret."""
    return isinstance(name, str) and _IS_SECRET.search(name) is not None


def learn_passwords(*clients: Any) -> None:
    """Make `redact` mask the passwords of these clients, brokers, stores or backends. Opens no connection."""
    # Every client of a server has loaded urllib.parse. The import of this package does not load urllib.parse.
    from urllib.parse import quote, quote_plus

    global _known, _pattern  # noqa: PLW0603 - of a process, as its logging is
    found: set[str] = set()
    for client in clients:
        with suppress(Exception):
            found.update(_passwords_of(client))
    spelt = {form for one in found for form in (one, quote(one, safe=""), quote(one), quote_plus(one), repr(one)[1:-1])}
    new = {one for one in spelt if len(one) >= _LEAST and one not in _NO_SECRETS} - _known
    if new:
        _known |= new
        _pattern = re.compile("|".join(_exactly(one) for one in sorted(_known, key=len, reverse=True)))


def _exactly(password: str) -> str:
    # A short password may be part of an ordinary word.
    return rf"(?<!\w){re.escape(password)}(?!\w)" if len(password) < 8 and password.isalnum() else re.escape(password)


def _passwords_of(client: Any, depth: int = 6) -> Iterator[str]:
    """Yield the passwords of a redis-py client, of pika parameters, or of an object with such a client."""
    if client is None or depth == 0:
        return
    if isinstance(client, (list, tuple)):
        for one in client:
            yield from _passwords_of(one, depth)
        return
    if isinstance(client, Mapping):
        if isinstance(client.get("password"), (str, bytes)):
            yield _as_text(client["password"])
        yield from _passwords_of(client.get("credential_provider"), depth - 1)
        return
    held = {name: _attribute(client, name) for name in (*_HOLDERS, "password")}
    if isinstance(held["password"], (str, bytes)):
        yield _as_text(held["password"])
    for name in _HOLDERS:
        yield from _passwords_of(held[name], depth - 1)


def _attribute(owner: object, name: str) -> Any:
    """Return a plain attribute, perhaps one behind a property; None without one."""
    for spelling in (name, f"_{name}"):
        declared = inspect.getattr_static(type(owner), spelling, None)
        if isinstance(declared, MemberDescriptorType) or not hasattr(type(declared), "__get__"):
            with suppress(AttributeError):
                # Neither getattr(): a RedisBroker turns each unknown name into a command, and a property may connect.
                # Nor vars(): before CPython 3.13 each later look-up on the object, such as of a hook, would be slower.
                return object.__getattribute__(owner, spelling)
    return None


def _as_text(password: str | bytes) -> str:
    return password if isinstance(password, str) else password.decode(errors="replace")


def redacted_repr(value: object, depth: int = 3) -> str:
    """Return a safe repr for errors and log records. Never shows the inside of an object that may hold a password."""
    try:
        return redact(_described(value, depth))
    except Exception:
        # For example, the repr of an int with five thousand digits.
        return f"a {type(value).__name__}"


def is_path(value: object) -> bool:
    """Return whether a value is a path of ``pathlib``. Does not import ``pathlib``, which is a tenth of the import of this package."""
    pathlib = sys.modules.get("pathlib")
    return pathlib is not None and isinstance(value, pathlib.PurePath)


def _described(value: object, depth: int) -> str:
    kind = type(value)
    if isinstance(value, str) and ("://" in value or redact(value) != value):
        # The end of a password in a URL is a guess, and the path of a webhook is secret too.
        return f"a {kind.__name__} with a URL or a password"
    if (
        value is None
        or isinstance(
            value, (bool, int, float, complex, str, timedelta, date, datetime, enum.Enum, type, BaseException)
        )
        or is_path(value)
    ):
        return repr(value)
    if isinstance(value, functools.partial):
        return f"partial({_described(value.func, depth - 1)})"
    if inspect.ismethod(value) or (inspect.isbuiltin(value) and not inspect.ismodule(value.__self__)):
        # The repr includes the object.
        return f"<method {value.__qualname__}>"
    if inspect.isroutine(value):
        return repr(value)
    if kind in (list, tuple, set, frozenset, dict):
        return _container(value, depth)
    if kind.__module__.startswith("dramatiq_policies.") and "client" not in getattr(value, "__dict__", {}):
        return repr(value)
    return f"a {kind.__name__}"


def _container(value: Any, depth: int) -> str:
    if depth == 0 and value:
        return f"a {type(value).__name__}"
    if isinstance(value, dict):
        pairs = (
            f"{_described(name, depth - 1)}: {repr(_MASK) if is_secret_name(name) else _described(one, depth - 1)}"
            for name, one in value.items()
        )
        return f"{{{', '.join(pairs)}}}"
    parts: Iterable[str] = [_described(one, depth - 1) for one in value]
    inside = ", ".join(parts)
    if isinstance(value, tuple):
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, list):
        return f"[{inside}]"
    return f"{{{inside}}}" if value and isinstance(value, set) else f"{type(value).__name__}({{{inside}}})"
