"""Run a job in a greenlet, and interrupt the job at the deadline or at shutdown: `threads.run` for gevent.

The hub throws the exception into the greenlet. The hub runs only while the greenlet waits: no exception is ever pending.
The hub checks that the job is running, and throws without a switch of greenlets: no interrupt comes after the end of the job.
(``Greenlet.kill(block=False)``, which Dramatiq uses at shutdown, throws later, when the job may have ended.)

A job that never waits can't be interrupted and blocks the whole process; no code in the process could report it.
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
from ..common.current import Job
from ..errors import TimeoutExceeded
from .slots import StuckListener, noop, report_on_thread
from .threads import unwrap_interrupt

__all__ = ["run", "shutdown"]

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
        "interrupted",
        "on_shutdown",
    )

    def __init__(
        self, deadline: float | None, on_shutdown: bool, stuck_listener: StuckListener | None, job: Job | None
    ) -> None:
        self.on_shutdown = on_shutdown
        self.interrupted = False
        self._deadline = deadline
        self._watch = stuck_listener
        self._job = job
        self._over = False
        self._greenlet: Any = gevent.getcurrent()
        self._loop: Any = gevent.get_hub().loop
        # The hub makes the exception in the job's context: TimeoutExceeded reads the current job.
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
            self.interrupted = True
            self._greenlet.throw(self._context.run(exception))

    def interrupt(self, exception: type[BaseException]) -> None:
        self._loop.run_callback(self._throw, exception)

    def _report(self) -> None:
        self._stop_timer()
        stuck_listener, job = self._watch, self._job
        if stuck_listener is None or self._over:
            return
        frame = self._greenlet.gr_frame
        stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
        report_on_thread(lambda: stuck_listener.stuck(job, stack))


_runs: dict[Any, _Run] = {}


def run(
    fn: Callable[..., R],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    deadline: float | None = None,
    on_shutdown: bool = False,
    stuck_listener: StuckListener | None = None,
    job: Job | None = None,
    after_interrupt: Callable[[], object] = noop,
) -> R:
    """See `threads.run`."""
    greenlet = gevent.getcurrent()
    if (deadline is None and not on_shutdown) or greenlet in _runs:
        return fn(*args, **kwargs)
    running = _runs[greenlet] = _Run(deadline, on_shutdown, stuck_listener, job)
    try:
        return fn(*args, **kwargs)
    except BaseException as error:
        running.interrupted = running.interrupted or is_async_exception(error)
        cause = unwrap_interrupt(error)
        if cause is error:
            raise
        raise cause from None
    finally:
        running.end()
        del _runs[greenlet]
        if running.interrupted:
            after_interrupt()


def shutdown() -> None:
    """See `threads.shutdown`."""
    for run in list(_runs.values()):
        if run.on_shutdown:
            run.on_shutdown = False
            run.interrupt(Shutdown)
