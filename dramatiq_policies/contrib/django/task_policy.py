"""`policy`: the rules of a Django task."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import ConfigurationError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ...delivery.actor_options import ActorOptions

__all__ = ["OPTIONS", "policy"]

F = TypeVar("F", bound=Callable[..., Any])

#: The attribute of a task's function with the options of its actor.
OPTIONS = "dramatiq_policies_options"
#: The options of an actor that Django's ``@task`` gives.
_OF_THE_TASK = ("actor_name", "priority", "queue_name")


def policy(**options: Unpack[ActorOptions]) -> Callable[[F], F]:
    """Give a Django task the options of an actor. Write it below ``@task``.

    ::

        @task
        @policy(retry_on=ConnectionError, timeout=timedelta(seconds=30), store_results=True)
        def sync_stock(product_id): ...

    All options of `dramatiq_policies.actor` are allowed, except ``queue_name``, ``priority`` and ``actor_name``: those are
    the task's. Other task backends ignore the options.

    Raises:
      ConfigurationError: An option is the task's, or the decorator is not below ``@task``. A wrong option fails where
        ``@task`` declares the task.
    """
    for name in _OF_THE_TASK:
        if name in options:
            raise ConfigurationError(f"policy(): {name} is an option of the task. Give it to @task.")

    def declare(function: F) -> F:
        if not hasattr(function, "__code__"):
            kind = type(function).__name__
            raise ConfigurationError(f"policy() decorates a function, got a {kind}. Write @policy below @task.")
        setattr(function, OPTIONS, dict(options))
        return function

    return declare
