"""Choose how to run a job interruptibly: on a thread, on the event loop, or in a greenlet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from dramatiq.threading import is_gevent_active

from ..common.current import Job
from . import coroutines, threads
from .slots import StuckListener, noop

__all__ = ["Runner", "runner_for", "shutdown"]

R = TypeVar("R")

_gevent_is_active: Callable[[], bool] = is_gevent_active


class Runner(Protocol):
    """`threads.run`, or the counterpart for coroutines or greenlets."""

    def __call__(
        self,
        fn: Callable[..., R],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        deadline: float | None = None,
        on_shutdown: bool = False,
        stuck_listener: StuckListener | None = None,
        job: Job | None = None,
        after_interrupt: Callable[[], object] = noop,
    ) -> R: ...


def runner_for(fn: Callable[..., Any]) -> Runner:
    """Return the `run` for an actor's function."""
    if coroutines.is_async(fn):
        return coroutines.run
    if _gevent_is_active():
        from . import greenlets

        return greenlets.run
    return threads.run


def shutdown() -> None:
    """Raise Dramatiq's ``Shutdown`` in every running job with ``notify_shutdown``."""
    if _gevent_is_active():
        from . import greenlets

        greenlets.shutdown()
    threads.shutdown()
