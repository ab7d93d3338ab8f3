"""What idempotency remembers of one job, asked by the job's arguments as they are written on a command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from ..idempotency.keys import signature_of
from ..middleware.idempotency import Idempotency, KeyState
from .app import OperationError, one_line

if TYPE_CHECKING:
    from dramatiq import Actor

__all__ = ["forget_key", "key_state", "read_arguments"]


def key_state(actor: Actor[..., Any], *args: Any, **kwargs: Any) -> KeyState:
    """What is remembered of the job that these arguments name; with ``idempotent=True`` the argument is a message id.

    Raises:
      OperationError: If the actor has no key, the arguments don't fit, or the store can't be asked.
    """
    return _ask_store(Idempotency.state, actor, args, kwargs)  # type: ignore[no-any-return]


def forget_key(actor: Actor[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Forget it, so that the next message runs; whether anything was remembered. Arguments and errors as `key_state`."""
    return bool(_ask_store(Idempotency.forget, actor, args, kwargs))


def _ask_store(ask: Any, actor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return ask(actor, *args, **kwargs)
    except (ConfigurationError, TypeError) as error:
        raise OperationError(str(error)) from None
    except Exception as error:
        raise OperationError(f"The store can't be asked: {one_line(error).rstrip('.')}.") from None


def read_arguments(actor: Actor[..., Any], texts: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments from a command line: JSON where they are, else text; text for those annotated ``str``; ``name=value``
    for keywords."""
    known = signature_of(actor.fn).parameters
    parameters = list(known.values())
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for text in texts:
        name, found, value = text.partition("=")
        if found and name in known:
            kwargs[name] = _value(value, known[name].annotation)
        else:
            at = len(args)
            args.append(_value(text, parameters[at].annotation if at < len(parameters) else None))
    return args, kwargs


def _value(text: str, annotation: Any) -> Any:
    if annotation in (str, "str"):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text
