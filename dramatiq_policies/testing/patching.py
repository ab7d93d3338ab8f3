"""Something else in the place of an actor's function, while a test lasts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dramatiq.asyncio import async_to_sync

from ..common.callables import unwrapped
from ..interrupts.coroutines import is_async
from ..middleware.base import PolicyMiddleware
from ..middleware.ordering import order_middleware, resolve_actor

if TYPE_CHECKING:
    from dramatiq import Actor

__all__ = ["around", "in_place_of"]


@contextmanager
def in_place_of(actor: Actor[..., Any], make: Callable[[Any], Any]) -> Iterator[None]:
    """Have ``make(fn)`` run where the actor's own ``fn`` would, with the bundle around it, while it lasts."""
    # Of a class-based actor the class is taken, too.
    actor = getattr(actor, "__actor__", actor)
    saved = actor.fn
    actor.fn = make(unwrapped(saved))
    _resolve_again(actor)
    try:
        yield
    finally:
        actor.fn = saved
        _resolve_again(actor)


def _resolve_again(actor: Actor[..., Any]) -> None:
    """What the bundle knows of the actor's function (``done_when`` is asked before it) is of the one that it has now."""
    if any(isinstance(middleware, PolicyMiddleware) for middleware in actor.broker.middleware):
        state = order_middleware(actor.broker)
        state.policies.pop(actor.actor_name, None)
        resolve_actor(state, actor)


def around(fn: Any, before: Callable[[bool], Any], after: Callable[[], None] | None = None) -> Any:
    """``fn``, sync or async as it is, with a call before it (told which, may return an awaitable) and one after it."""
    if is_async(fn):
        coroutine = fn.__wrapped__

        @functools.wraps(coroutine)
        async def run_async(*args: Any, **kwargs: Any) -> Any:
            waits = before(True)
            if waits is not None:
                await waits
            result = await coroutine(*args, **kwargs)
            if after is not None:
                after()
            return result

        return async_to_sync(run_async)

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        before(False)
        result = fn(*args, **kwargs)
        if after is not None:
            after()
        return result

    return run
