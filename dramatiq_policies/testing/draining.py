"""`drain`: run all queued messages on the calling thread, through Dramatiq's own worker code.

A worker without threads boots, takes messages off the queues as consumer threads do, processes messages as worker threads do,
and shuts down. If no message is ready, the virtual clock advances to the next delayed message.
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
from ..common.middleware import find_middleware
from ..common.plurals import counted
from ..delivery.consumer import REDELIVERED
from ..delivery.delivery import current
from ..errors import ConfigurationError, checked_duration
from ..interrupts import threads as interrupts
from ..middleware.metrics import Metrics
from .django_connections import connections_stay_open
from .inline_worker import InlineWorker
from .recorder import recording
from .run import Entry, Run
from .stub_environment import StubEnvironment, environment_of
from .virtual_time import VirtualStop

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Drain", "TooManyRuns", "WorkerDied", "drain", "drain_in_progress"]

#: The pause of a consumer thread before it connects again, in seconds.
_RECONNECT_AFTER = 3.0
#: The pauses between two tries to publish rows of an outbox, in virtual ms: ten minutes in all.
_RELAY_PAUSES = (1_000, 2_000, 4_000, 8_000, 16_000, 32_000, *[60_000] * 9)

_in_progress: ContextVar[Drain | None] = ContextVar("dramatiq_policies_drain", default=None)


class TooManyRuns(AssertionError):
    """The jobs of a broker have exceeded ``max_runs``."""


class WorkerDied(BaseException):
    """Raised in a job, and in the code after the job, if the test kit lets the worker die."""


def drain(broker: Broker, *, until: int | timedelta | None = None, max_runs: int = 10_000) -> Run:
    """Run all queued messages of a StubBroker until the queues are empty, and return a record of the run::

        def test_a_timeout_is_retried_and_the_customer_gets_one_mail(stub_broker):
            with fail(send_confirmation, EmailTimeout, times=2):
                send_confirmation.send(42, "ada@example.com")
                run = drain(stub_broker)
            run.assert_outcomes(send_confirmation, "retried", "retried", "succeeded")
            run.assert_waits(send_confirmation, 2_000, 4_000)
            assert len(outbox) == 1

    The jobs run on the calling thread, through Dramatiq's own worker code: middleware, retries, pipelines, groups and results
    behave as in production. Messages that the jobs send run too. A virtual clock skips all waits, so the test above takes
    milliseconds. With pytest, the fixture ``drain`` passes the broker.

    Parameters:
      broker: A StubBroker with dramatiq_policies; for other brokers see `stub`.
      until: The virtual time after which to stop, in milliseconds or as a ``timedelta``. Messages with a longer delay stay
        queued, and the next drain continues from that time. Default None: no end.
      max_runs: The largest number of runs beyond one for each queued message. Default 10,000.

    Raises:
      ConfigurationError: The broker is no StubBroker, or has no dramatiq_policies middleware.
      TooManyRuns: The jobs don't end, for example because a job sends itself. The remaining messages stay queued.

    The rules handle the exceptions of jobs. `drain` raises only exceptions for the test itself, such as KeyboardInterrupt and
    the exception of ``pytest.fail``.
    """
    environment = environment_of(broker)
    if type(max_runs) is not int or max_runs < 0:
        raise ConfigurationError.of_option("drain()", "max_runs", "an int of at least 0", max_runs)
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
                    f"{counted(runs, 'run')}, and still not at an end: does a job send itself? The last "
                    f"ones:{last}\nIf you expect this many runs, give drain() a higher max_runs."
                )
    return work.run


def drain_in_progress() -> Drain | None:
    """Return the drain of this thread or event loop, or None."""
    return _in_progress.get()


class Drain:
    """A worker on this thread: boots on entry, shuts down on exit.

    Attributes:
      run: The record of the messages so far.
      died: Whether the worker has died in the current job. Its message gets no further step.
    """

    def __init__(self, environment: StubEnvironment) -> None:
        self.environment = environment
        self.broker = environment.broker
        self.clock = environment.clock
        metrics = find_middleware(environment.broker, Metrics)
        self.run = Run(environment.broker.actors, metrics)
        self.died = False
        #: The ids of messages that wait for the idempotency store.
        self._stalled: set[str] = set()
        self._sources: list[str] = []
        #: How often in a row the broker has refused the rows of the outbox.
        self._refusals = 0
        self._began = 0
        self._exit = ExitStack()
        self._worker = InlineWorker(self.broker, _Hooks(self))

    def __enter__(self) -> Self:
        environment, state = self.environment, self.environment.state
        if environment.draining:
            raise RuntimeError("A drain() of this broker is running: a job can't call drain().")
        with ExitStack() as stack:
            environment.draining = True
            stack.callback(setattr, environment, "draining", False)
            self._set_clock_back()
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
            stack.callback(self._remove_worker)
            stack.enter_context(connections_stay_open(self.broker))
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

    def _set_clock_back(self) -> None:
        # A few real ms pass between a test's first delayed message and its first drain.
        if self.clock.skipped == 0:
            sent = [message.message_timestamp for message in self.environment.delayed()]
            self.clock.now = min([self.clock.now, *(at for at in sent if at > self.clock.now - 60_000)])

    def _remove_worker(self) -> None:
        # In place: dramatiq_policies has sorted this list.
        middleware = self.broker.middleware
        middleware[:] = [one for one in middleware if _dramatiq.worker_behind(one) is not self._worker]

    def step(self, limit: int | None = None) -> bool:
        """Run the next message; return False if no message is due before the virtual time ``limit``."""
        worker = self._worker
        while not self.environment.state.stopping.is_set():
            self._fetch()
            message = worker.next()
            if message is not None:
                self._process(message)
                return True
            if self.environment.unpublished and self._publish_rows():
                continue
            due = self._next_eta(self._stalled if self.environment.store_is_down and limit is None else ())
            if self.environment.unpublished and self._refusals <= len(_RELAY_PAUSES):
                again = self.clock.now + _RELAY_PAUSES[self._refusals - 1]
                due = again if due is None else min(due, again)
            if due is None or (limit is not None and due > limit):
                break
            self.clock.advance(max(0, due - self.clock.now))
        if limit is not None:
            self.clock.advance(max(0, limit - self.clock.now))
        return False

    def _fetch(self) -> None:
        """Take ready messages off the queues, due messages of delay queues first."""
        consumers, queues = self._worker.consumers, self.broker.queues
        # A job may have declared a queue.
        if len(self._sources) != len(consumers):
            self._sources = sorted(consumers, key=_delay_queues_first)
        for name in self._sources:
            delayed = consumers[name].delay_queue.queue
            while queues[name].queue or (delayed and _dramatiq.eta_of(delayed[0]) <= self.clock.now):
                try:
                    self._worker.fetch(name)
                except BrokerConnectionError:
                    # A consumer thread connects again after a pause.
                    if self.environment.state.stopping.wait(_RECONNECT_AFTER):
                        return

    def _publish_rows(self) -> bool:
        """Publish committed rows of the outbox, as a relay does. Returns whether all rows of a commit were published."""
        unpublished = self.environment.unpublished
        before = len(unpublished)
        unpublished[:] = [rows for rows in unpublished if not rows.publish()]
        was_published = len(unpublished) < before
        self._refusals = 0 if was_published else self._refusals + 1
        return was_published

    def _next_eta(self, but_of: Collection[str]) -> int | None:
        """Return the time of the next delayed message, without messages that would only wait for the store again."""
        etas = [
            _dramatiq.eta_of(item)
            for thread in self._worker.consumers.values()
            for item in (thread.delay_queue.queue if but_of else thread.delay_queue.queue[:1])
            if _dramatiq.delayed_message(item).message_id not in but_of
        ]
        return None if not etas else ceil(min(etas))

    def _process(self, message: MessageProxy) -> None:
        outbox = self.environment.outbox
        before = None if outbox is None else outbox.before_job()
        try:
            self._worker.run(message)
        except WorkerDied:
            pass
        if self.died:
            # Outside of the handler, which keeps the frames of the dead worker.
            self.died = False
            current.set(None)
            _dramatiq.forget_exception(message)
            if outbox is not None:
                outbox.forget_job(before)
            self._redeliver(message)
            return
        error = _dramatiq.exception_of(message)
        if error is not None and not isinstance(error, _JOB_ERRORS):
            raise error

    def _redeliver(self, message: MessageProxy) -> None:
        """Put the message of a dead worker back on its queue, as delivered before."""
        self.run.entries.append(
            Entry(self.clock.now - self._began, None, message, "the worker died; the message is redelivered")
        )
        delivery = message.delivery
        if delivery.claim is not None:
            # The record still names this process, which has lost the run.
            delivery.transport.state.idempotency.claims.drop(delivery.claim)
        again: Message[Any] = Message.decode(message.body)
        again.options[REDELIVERED] = True
        self.broker.queues[delivery.transport.source].put(again.encode())
        delivery.transport.ack(message)


#: The exceptions of jobs; other exceptions are for the test.
_JOB_ERRORS = (Exception, SystemExit, GeneratorExit, Interrupt, asyncio.CancelledError)


def _delay_queues_first(name: str) -> tuple[bool, str]:
    return q_name(name) == name, name


class _Hooks:
    """Replaces the broker of a worker thread: a dead worker calls no hooks."""

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
