"""Find an exception class by name."""

from __future__ import annotations

import builtins
import functools
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..app import OperationError, did_you_mean
from .explanation import policy_of

if TYPE_CHECKING:
    from dramatiq import Actor

__all__ = ["find_exception"]


def find_exception(actor: Actor[..., Any], name: str) -> type[BaseException]:
    """Return an exception class by ``module:Class``, ``module.Class``, or a bare name from the actor's module, its
    rules or Python.

    Raises:
      OperationError: There is no such exception class.
    """
    module, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    if module:
        try:
            found: Any = functools.reduce(getattr, attribute.split("."), import_module(module))
        except Exception as error:
            raise OperationError(f"{name!r} can't be imported: {error}") from None
    else:
        rules = {rule.resolve().__name__: rule.resolve() for rule in policy_of(actor).rules.rules}
        places = (getattr(actor.fn, "__globals__", {}), vars(import_module(actor.fn.__module__)), rules, vars(builtins))
        known = {key: value for place in reversed(places) for key, value in place.items() if _is_exception(value)}
        found = known.get(attribute)
        if found is None:
            near = did_you_mean(attribute, known)
            raise OperationError(
                f"{name!r} is not an exception class{('; write it as module:Class.' if near == '.' else near)}"
            )
    if not _is_exception(found):
        raise OperationError(f"{name!r} is not an exception class; write it as module:Class.")
    return found  # type: ignore[no-any-return]


def _is_exception(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)
