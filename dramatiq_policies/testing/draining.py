"""`drain`: what is queued runs to its end, on the calling thread and through Dramatiq's own worker code.

A worker without threads is booted, takes messages off the queues as its consumer threads would, processes them as a worker
thread would, and is shut down again. When nothing is ready, the virtual clock goes forward to the next delayed message.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import ExitStack
from contextvars import ContextVar
from datetime import timedelta
from math import ceil
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dramatiq import Message
from dramatiq.asyncio import get_event_loop_thread, set_event_loop_thread
from dramatiq.broker import Broker, MessageProxy
from dramatiq.common import q_name
from dramatiq.errors import BrokerConnectionError
from dramatiq.threading import Interrupt

from .. import _dramatiq
from ..delivery.consumer import REDELIVERED
from ..delivery.delivery import current
from ..errors import checked_duration
from ..interrupts import threads as interrupts
from .recorder import recording
from .run import Entry, Run
from .stub_environment import StubEnvironment, environment_of
from .virtual_time import VirtualStop

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Drain", "TooManyRuns", "WorkerDied", "drain", "drain_in_progress"]

#: What a consumer thread waits for, in seconds, before it tries to reach its broker again.
_RESTART = 3.0

_in_progress: ContextVar[Drain | None] = ContextVar("dramatiq_policies_drain", default=None)


class TooManyRuns(AssertionError):
    """The jobs of a broker did not come to an end."""


class WorkerDied(BaseException):
    """Raised in a job, and in what comes after it, where the test kit lets the worker die."""


def drain(broker: Broker, *, until: int | timedelta | None = None, max_runs: int = 10_000) -> Run:
    """Run everything that is queued on a StubBroker to its end, and say what became of it.

    Messages that the jobs send are run too, waits are skipped on a virtual clock, and all happens on the calling thread,
    through Dramatiq's own worker code: middleware, retries, pipelines, groups and results as in production.

    Parameters:
      broker: A StubBroker with the bundle on it; see `stub` for others.
      until: Stop when so much virtual time has gone by, in milliseconds or as a ``timedelta``: what is delayed for
        longer stays queued, and the next drain goes on from there. None, the default, for no end.
      max_runs: How many runs there may be beside one for each message that is queued at the beginning.

    Raises:
      ConfigurationError: The broker is no StubBroker, or has none of the bundle's middleware.
      TooManyRuns: The jobs go on without an end, such as those that send themselves. What is left stays queued.

    What a job raises goes the way of its rules; only what is meant for the test itself (KeyboardInterrupt, `pytest.fail`)
    is raised here.
    """
    environment = environment_of(broker)
    limit = None if until is None else checked_duration("drain()", "until", until)
    with Drain(environment) as work:
        if limit is not None:
            limit += environment.clock.now
        allowed = max_runs + sum(queue.qsize() for queue in environment.broker.queues.values())
        runs = 0
        while work.step(limit):
            runs += 1
            if runs > allowed:
                last = "".join(f"\n  {entry}" for entry in work.run.entries[-10:])
                raise TooManyRuns(
                    f"{runs} runs, and still not at an end: does a job send itself? The last ones:{last}\n"
                    "If all of them are meant, give drain() a higher max_runs."
                )
    return work.run


def drain_in_progress() -> Drain | None:
    """The drain on whose thread, or event loop, this is called."""
    return _in_progress.get()


class Drain:
    """A worker on this thread, booted on entry and shut down on exit.

    Attributes:
      run: What became of the messages so far.
      died: Whether the worker has died in the job at hand: nothing more is done for its message.
    """

    def __init__(self, environment: StubEnvironment) -> None:
        self.environment = environment
        self.broker = environment.broker
        self.clock = environment.clock
        self.run = Run(environment.broker.actors, environment.state.metrics)
        self.died = False
        #: The messages that wait for the idempotency store.
        self._stalled: set[str] = set()
        self._sources: list[str] = []
        self._began = 0
        self._exit = ExitStack()
        self._worker = _dramatiq.InlineWorker(self.broker, _Hooks(self))

    def __enter__(self) -> Self:
        environment, state = self.environment, self.environment.state
        if environment.draining:
            raise RuntimeError("This broker is being drained already: drain() can't be called from one of its jobs.")
        with ExitStack() as stack:
            environment.draining = True
            stack.callback(setattr, environment, "draining", False)
            self._wind_back()
            stack.enter_context(self.clock.in_force())
            self._began = self.clock.now
            stack.callback(_in_progress.reset, _in_progress.set(self))
            stack.callback(current.reset, current.set(None))
            if not interrupts.timer_runs():
                stack.callback(interrupts.end_timer)
            stack.callback(set_event_loop_thread, get_event_loop_thread())
            self._stalled = stack.enter_context(recording(self.run, environment, lambda: _in_progress.get() is self))
            stack.callback(setattr, state, "stopping", state.stopping)
            state.stopping = VirtualStop(self.clock)
            stack.callback(self._take_worker_off)
            stack.callback(self._worker.stop)
            self._worker.start()
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._exit.__exit__(kind, error, traceback)
        self.run.elapsed = self.clock.now - self._began
        self.run.note_actors(self.broker.actors)

    def _wind_back(self) -> None:
        # By the time of the first drain a few real ms have gone by since a delayed message was sent.
        if self.clock.skipped == 0:
            sent = [message.message_timestamp for message in self.environment.delayed()]
            self.clock.now = min([self.clock.now, *(at for at in sent if at > self.clock.now - 60_000)])

    def _take_worker_off(self) -> None:
        # In place: the list is the one that the bundle has put in order.
        middleware = self.broker.middleware
        middleware[:] = [one for one in middleware if _dramatiq.worker_behind(one) is not self._worker]

    def step(self, limit: int | None = None) -> bool:
        """Run the next message; False if there is none, or none before the virtual time ``limit``."""
        worker = self._worker
        while not self.environment.state.stopping.is_set():
            self._fetch()
            message = worker.next()
            if message is not None:
                self._process(message)
                return True
            due = self._next_eta(self._stalled if self.environment.store_is_down and limit is None else ())
            if due is None or (limit is not None and due > limit):
                break
            self.clock.advance(max(0, due - self.clock.now))
        if limit is not None:
            self.clock.advance(max(0, limit - self.clock.now))
        return False

    def _fetch(self) -> None:
        """Take whatever is ready off the queues; first of all, what has become due off the delay queues."""
        consumers, queues = self._worker.consumers, self.broker.queues
        # A job may declare one meanwhile.
        if len(self._sources) != len(consumers):
            self._sources = sorted(consumers, key=_delay_queues_first)
        for name in self._sources:
            delayed = consumers[name].delay_queue.queue
            while queues[name].queue or (delayed and _dramatiq.eta_of(delayed[0]) <= self.clock.now):
                try:
                    self._worker.fetch(name)
                except BrokerConnectionError:
                    # A consumer thread begins anew after a while.
                    if self.environment.state.stopping.wait(_RESTART):
                        return

    def _next_eta(self, but_of: Collection[str]) -> int | None:
        """When the next delayed message is due, but for those that would only be put back again."""
        etas = [
            _dramatiq.eta_of(item)
            for thread in self._worker.consumers.values()
            for item in (thread.delay_queue.queue if but_of else thread.delay_queue.queue[:1])
            if _dramatiq.delayed_message(item).message_id not in but_of
        ]
        return None if not etas else ceil(min(etas))

    def _process(self, message: MessageProxy) -> None:
        try:
            self._worker.run(message)
        except WorkerDied:
            self._redeliver(message)
            return
        error = _dramatiq.exception_of(message)
        if error is not None and not isinstance(error, _OF_JOBS):
            raise error

    def _redeliver(self, message: MessageProxy) -> None:
        """The message that a worker was never to ack comes back, as it was delivered."""
        self.died = False
        current.set(None)
        self.run.entries.append(
            Entry(self.clock.now - self._began, None, message, "the worker died; the message is redelivered")
        )
        delivery = message.delivery
        if delivery.claim is not None:
            # It goes on naming this process, which has no such run any more.
            delivery.claim.claims.drop(delivery.claim)
        again: Message[Any] = Message.decode(message.body)
        again.options[REDELIVERED] = True
        self.broker.queues[delivery.transport.source].put(again.encode())
        delivery.transport.ack(message)


#: What a job may end with; anything else is for the test.
_OF_JOBS = (Exception, SystemExit, GeneratorExit, Interrupt, asyncio.CancelledError)


def _delay_queues_first(name: str) -> tuple[bool, str]:
    return q_name(name) == name, name


class _Hooks:
    """Stands in for the broker where a worker thread calls hooks: when the worker has died, none of them is."""

    def __init__(self, work: Drain) -> None:
        self.work = work
        self.emit_before = work.broker.emit_before
        self.get_actor = work.broker.get_actor

    @property
    def died(self) -> bool:
        return self.work.died

    def emit_after(self, signal: str, *args: Any, **kwargs: Any) -> None:
        if self.work.died:
            raise WorkerDied
        self.work.broker.emit_after(signal, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.work.broker, name)
