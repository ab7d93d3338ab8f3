"""Replace an actor's function during a test, for some runs or for all."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dramatiq.asyncio import async_to_sync

from ..common.callables import unwrapped
from ..errors import ConfigurationError
from ..interrupts.coroutines import is_async
from ..middleware.base import has_policies
from ..middleware.ordering import order_middleware, resolve_actor

if TYPE_CHECKING:
    from dramatiq import Actor

__all__ = ["Times", "around", "expect_actor", "in_place_of"]


class Times:
    """Counts the failures that are left; None for always.

    Raises:
      ConfigurationError: ``times`` is no int of at least 0.
    """

    def __init__(self, where: str, times: int | None) -> None:
        if times is not None and (type(times) is not int or times < 0):
            raise ConfigurationError.of_option(where, "times", "an int of at least 0, or None for always", times)
        self.left = times
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Take one failure. Returns whether one was left."""
        with self._lock:
            if self.left is None:
                return True
            self.left -= 1
            return self.left >= 0


def expect_actor(where: str, actor: Any) -> None:
    """Raise a `ConfigurationError` unless the value is an actor, or the class of a class-based actor."""
    declared = getattr(actor, "__actor__", actor)
    if not (hasattr(declared, "send_with_options") and hasattr(declared, "broker")):
        raise ConfigurationError.of_option(where, "actor", "an actor", actor, "Pass what @dramatiq.actor returns")


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
    if has_policies(actor.broker):
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
