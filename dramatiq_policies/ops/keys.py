"""Read and delete the idempotency record of a job, by the job's arguments."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ..common.middleware import find_middleware
from ..errors import PolicyError
from ..idempotency.keys import signature_of
from ..middleware.idempotency import Idempotency, KeyState
from .app import OperationError, did_you_mean
from .unreachable import store_error

if TYPE_CHECKING:
    from dramatiq import Actor

    from ..stores import IdempotencyStore

__all__ = ["forget_key", "key_state", "read_arguments"]

T = TypeVar("T")


def key_state(actor: Actor[..., Any], *args: Any, **kwargs: Any) -> KeyState:
    """Return the record of the job with these arguments. For ``idempotent=True`` the argument is a message id.

    Raises:
      OperationError: The actor has no key, the arguments don't fit, or the store can't be reached.
    """
    return _ask_store(Idempotency.state, actor, args, kwargs)


def forget_key(actor: Actor[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Delete the record so that the next message runs; return whether there was a record. Arguments and errors as
    `key_state`."""
    return _ask_store(Idempotency.forget, actor, args, kwargs)


def _ask_store(ask: Callable[..., T], actor: Actor[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    try:
        return ask(actor, *args, **kwargs)
    except PolicyError as error:
        raise OperationError(str(error)) from None
    except TypeError as error:
        raise OperationError(f"{actor.actor_name}{signature_of(actor.fn)}: {error}.") from None
    except Exception as error:
        raise store_error(_store_of(actor), error) from None


def _store_of(actor: Actor[..., Any]) -> IdempotencyStore | None:
    idempotency = find_middleware(actor.broker, Idempotency)
    return None if idempotency is None else idempotency.store


def read_arguments(actor: Actor[..., Any], texts: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """Parse arguments of a command line: JSON if valid, else text; text if annotated ``str``; ``name=value`` for
    keywords.

    Raises:
      OperationError: A keyword is near the name of a parameter, and none.
    """
    known = signature_of(actor.fn).parameters
    parameters = list(known.values())
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for text in texts:
        name, found, value = text.partition("=")
        if found and name in known:
            kwargs[name] = _value(value, known[name].annotation)
        elif found and name.isidentifier() and (near := did_you_mean(name, known)) != ".":
            raise OperationError(f"{actor.actor_name} has no argument {name!r}{near}")
        else:
            at = len(args)
            args.append(_value(text, parameters[at].annotation if at < len(parameters) else None))
    return args, kwargs


def _value(text: str, annotation: object) -> Any:
    if annotation in (str, "str"):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text
