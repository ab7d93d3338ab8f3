"""``dramatiq.actor`` for type checkers, with the type of every option.

Never imported at run time: there `dramatiq_policies.actor` is ``dramatiq.actor``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec, TypeVar, overload

from dramatiq import Actor, Broker
from dramatiq.actor import ActorDecorator
from typing_extensions import Unpack

from .delivery.actor_options import ActorOptions

P = ParamSpec("P")
R = TypeVar("R")


@overload
def actor(fn: Callable[P, Awaitable[R]]) -> Actor[P, R]: ...


@overload
def actor(fn: Callable[P, R]) -> Actor[P, R]: ...


@overload
def actor(
    *,
    actor_class: Callable[..., Actor[Any, Any]] = ...,
    broker: Broker | None = ...,
    **options: Unpack[ActorOptions],
) -> ActorDecorator: ...


def actor(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("only type checkers read this module")
