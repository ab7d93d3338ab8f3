"""Running a job under gevent so that it can be interrupted: `call`, as in `interrupts`, by gevent's own means.

An exception is thrown into a greenlet from the hub, which runs only while the greenlet waits for something: there is
nothing that could be pending. The hub looks whether the job's run has ended and throws in one step, without giving
control away between, so no interrupt comes after the end; and the end takes effect without giving control away either.
(``Greenlet.kill(block=False)``, which Dramatiq uses for a shutdown, throws later, whatever the greenlet does by then.)

A job that never waits can't be interrupted and holds up the whole process; nothing in the process could report it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from time import monotonic
from typing import Any, TypeVar

import gevent
from dramatiq.middleware import Shutdown

from ..common.connections import is_async_exception
from ..errors import TimeoutExceeded
from .slots import Watch, report_apart
from .threads import nothing, unwrap_interrupt

__all__ = ["call", "shutdown"]

R = TypeVar("R")


class _Run:
    __slots__ = (
        "_context",
        "_deadline",
        "_greenlet",
        "_job",
        "_loop",
        "_over",
        "_timer",
        "_watch",
        "on_shutdown",
        "struck",
    )

    def __init__(self, deadline: float | None, on_shutdown: bool, watch: Watch | None, job: Any) -> None:
        self.on_shutdown = on_shutdown
        self.struck = False
        self._deadline = deadline
        self._watch = watch
        self._job = job
        self._over = False
        self._greenlet: Any = gevent.getcurrent()
        self._loop: Any = gevent.get_hub().loop
        # The exception is made in the hub, and says in the job's context which job it interrupts.
        self._context = copy_context()
        self._timer: Any = None
        if deadline is not None:
            self._start_timer(deadline, self._expire)

    def _start_timer(self, moment: float, callback: Callable[[], None]) -> None:
        self._timer = self._loop.timer(max(0.0, moment - monotonic()))
        self._timer.start(callback, update=True)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
            self._timer = None

    def end(self) -> None:
        self._over = True
        self.on_shutdown = False
        self._stop_timer()

    def _expire(self) -> None:
        self._stop_timer()
        if self._over or self._deadline is None:
            return
        if self._watch is not None:
            self._start_timer(self._deadline + self._watch.grace, self._report)
        self._throw(TimeoutExceeded)

    def _throw(self, exception: type[BaseException]) -> None:
        if not self._over:
            self.struck = True
            self._greenlet.throw(self._context.run(exception))

    def interrupt(self, exception: type[BaseException]) -> None:
        self._loop.run_callback(self._throw, exception)

    def _report(self) -> None:
        self._stop_timer()
        watch, job = self._watch, self._job
        if watch is None or self._over:
            return
        frame = self._greenlet.gr_frame
        stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
        report_apart(lambda: watch.stuck(job, stack))


_runs: dict[Any, _Run] = {}


def call(
    fn: Callable[..., R],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    deadline: float | None = None,
    on_shutdown: bool = False,
    watch: Watch | None = None,
    job: Any = None,
    after_interrupt: Callable[[], object] = nothing,
) -> R:
    """As `interrupts.call`."""
    greenlet = gevent.getcurrent()
    if (deadline is None and not on_shutdown) or greenlet in _runs:
        return fn(*args, **kwargs)
    run = _runs[greenlet] = _Run(deadline, on_shutdown, watch, job)
    try:
        return fn(*args, **kwargs)
    except BaseException as error:
        run.struck = run.struck or is_async_exception(error)
        cause = unwrap_interrupt(error)
        if cause is error:
            raise
        raise cause from None
    finally:
        run.end()
        del _runs[greenlet]
        if run.struck:
            after_interrupt()


def shutdown() -> None:
    """As `interrupts.shutdown`."""
    for run in list(_runs.values()):
        if run.on_shutdown:
            run.on_shutdown = False
            run.interrupt(Shutdown)
