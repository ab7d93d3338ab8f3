"""Find an exception class by name."""

from __future__ import annotations

import builtins
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..app import OperationError, did_you_mean, importing
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
        found: Any
        with importing(module):
            found = there = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part, None)
        known = {key: value for key, value in vars(there).items() if _is_exception(value)}
        if found is None:
            raise OperationError(f"{module} has no exception class {attribute!r}{did_you_mean(attribute, known)}")
    else:
        rules = {rule.resolve().__name__: rule.resolve() for rule in policy_of(actor).rules.rules}
        places = (getattr(actor.fn, "__globals__", {}), vars(import_module(actor.fn.__module__)), rules, vars(builtins))
        known = {key: value for place in reversed(places) for key, value in place.items() if _is_exception(value)}
        found = known.get(attribute)
        if found is None:
            suggestion = did_you_mean(attribute, known)
            raise OperationError(
                f"{name!r} is not an exception class{('; write it as module:Class.' if suggestion == '.' else suggestion)}"
            )
    if not _is_exception(found):
        raise OperationError(f"{name!r} is not an exception class; write it as module:Class.")
    return found  # type: ignore[no-any-return]


def _is_exception(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)
