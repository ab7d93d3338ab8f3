"""Replace an actor's function during a test."""

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
    """Run ``make(fn)`` in place of the actor's ``fn``, inside the wrapper of dramatiq_policies."""
    # For a class-based actor, accept the class too.
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
    """Resolve the actor's options for its new function."""
    if any(isinstance(middleware, PolicyMiddleware) for middleware in actor.broker.middleware):
        state = order_middleware(actor.broker)
        state.policies.pop(actor.actor_name, None)
        resolve_actor(state, actor)


def around(fn: Any, before: Callable[[bool], Any], after: Callable[[], None] | None = None) -> Any:
    """Return ``fn``, sync or async, with a call before and after. ``before`` gets True in an event loop, and may return
    an awaitable."""
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
