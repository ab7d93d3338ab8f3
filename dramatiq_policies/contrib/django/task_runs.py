"""Run Django's tasks in a worker: one actor per task, the context, the signals, the stored result."""

from __future__ import annotations

import functools
import inspect
import os
import socket
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import dramatiq
from django.tasks import Task, TaskContext, TaskResult, TaskResultStatus
from django.tasks.signals import task_finished, task_started
from django.utils import timezone
from django.utils.json import normalize_json
from dramatiq.common import q_name

from ... import _dramatiq
from ...common.callables import is_coroutine_callable
from ...delivery.broker_state import BrokerState
from ...delivery.history import attempt_of
from ...errors import ConfigurationError, how_to_add
from ...middleware.base import has_policies
from ...middleware.ordering import order_middleware
from ...outcomes import BAD_ENDINGS, Outcome, OutcomeEvent
from ...transactions.outbox import outbox_on
from .outbox_scope import AtomicScope
from .task_policy import OPTIONS
from .task_records import TaskRecords, error_of, result_of

if TYPE_CHECKING:
    from dramatiq import Actor, Message
    from dramatiq.broker import Broker, MessageProxy

    from ...delivery.delivery import Delivery
    from ...delivery.executor import Proceed

__all__ = ["TaskRuns", "runs_of"]

#: The result of the running task.
_running: ContextVar[TaskResult | None] = ContextVar("dramatiq_policies_django_task", default=None)

#: The outcomes after which a task runs again.
_RUNS_AGAIN = frozenset({Outcome.RETRIED, Outcome.DEFERRED, Outcome.INTERRUPTED})


def runs_of(broker: Broker) -> TaskRuns:
    """Return the tasks of a broker.

    Raises:
      ConfigurationError: The broker has no middleware of dramatiq_policies.
    """
    if not has_policies(broker):
        add = how_to_add("'dramatiq_policies.ErrorClassifier'", "install(broker)")
        raise ConfigurationError(f"DramatiqBackend: the broker has no middleware of dramatiq_policies. {add}.")
    state = order_middleware(broker)
    return state.shared(TaskRuns, state)


class TaskRuns:
    """The tasks of a broker."""

    def __init__(self, state: BrokerState) -> None:
        self.state = state
        self.broker = state.broker
        self.records = TaskRecords(state.broker)
        self._tasks: dict[str, Task] = {}
        # Inside of Idempotency: a duplicate does not start. Outside of a transaction: a success is committed.
        state.add_around_job(self._around_job, order=1)
        # After the Sentry reporter: Django logs the error of a failed task.
        state.outcomes.observe(self, self._observe, successes=False)

    def actor_of(self, task: Task) -> Actor[..., Any]:
        """Return the actor of a task. The first call declares the actor.

        Raises:
          ConfigurationError: An option of `policy` is wrong.
        """
        name = task.module_path
        actor = self.broker.actors.get(name)
        if actor is None:
            # Dramatiq runs lower numbers first, Django higher ones.
            declare = dramatiq.actor(
                actor_name=name,
                broker=self.broker,
                queue_name=task.queue_name,
                priority=-task.priority,
                **getattr(task.func, OPTIONS, {}),
            )
            actor = declare(_function_of(task))
        self._tasks.setdefault(name, task)
        return actor

    def save_new(self, result: TaskResult, message: Message[Any], delay: int) -> None:
        """Store the result of a message that is about to be sent. In a transaction of the outbox the result is stored at the commit.

        Call it before the send: then Django runs this callback before the outbox publishes the message.

        Parameters:
          delay: The delay of the message, in milliseconds.
        """
        if not self.records.are_kept_for(result.task):
            return
        outbox = outbox_on(self.state)
        scope = None if outbox is None else outbox.scope_of(message)
        if isinstance(scope, AtomicScope):
            scope.connection.on_commit(functools.partial(self._save_if_absent, result, delay), robust=True)
        else:
            self.records.save(result, delay)

    def _save_if_absent(self, result: TaskResult, delay: int) -> None:
        # The relay of a worker may have been faster.
        if self.records.find(result.task, result.id) is None:
            self.records.save(result, delay)

    def _around_job(self, delivery: Delivery, proceed: Proceed) -> Any:
        """Run a task between two signals. A success is stored before the acknowledgement."""
        task = self._tasks.get(delivery.message.actor_name)
        if task is None:
            return proceed(delivery)
        result = self._start(task, delivery)
        running = _running.set(result)
        try:
            value = proceed(delivery)
        finally:
            _running.reset(running)
        _set(result, status=TaskResultStatus.SUCCESSFUL, finished_at=timezone.now(), _return_value=value)
        self._finish(task, result)
        return value

    def _start(self, task: Task, delivery: Delivery) -> TaskResult:
        message, now = delivery.message, timezone.now()
        result = self.records.find(task, message.message_id)
        if result is None:
            result = result_of(task, message, q_name(message.queue_name))
            # The workers of the attempts before are not known.
            result.worker_ids.extend([""] * (attempt_of(message.options) - 1))
        result.worker_ids.append(_worker_id())
        first = result.started_at or now
        _set(result, status=TaskResultStatus.RUNNING, started_at=first, last_attempted_at=now, finished_at=None)
        self.records.save(result)
        task_started.send_robust(type(task.get_backend()), task_result=result)
        return result

    def _finish(self, task: Task, result: TaskResult) -> None:
        self.records.save(result)
        # Not send(): an error of a receiver would run the task again.
        task_finished.send_robust(type(task.get_backend()), task_result=result)

    def _observe(self, event: OutcomeEvent, proxy: MessageProxy | None) -> None:
        """Store the end of a run without success."""
        task = None if proxy is None else self._tasks.get(proxy.actor_name)
        if task is None or proxy is None:
            return
        message = _dramatiq.message_of(proxy)
        result = self.records.find(task, message.message_id)
        if result is None:
            result = result_of(task, message, q_name(message.queue_name))
            if event.duration_ms is not None:
                ended = timezone.now()
                began = ended - timedelta(milliseconds=event.duration_ms)
                _set(result, started_at=began, last_attempted_at=began)
                result.worker_ids.extend([""] * ((event.attempt or 1) - 1))
                result.worker_ids.append(_worker_id())
        error = event.exception
        if error is not None and (event.outcome in BAD_ENDINGS or event.outcome is Outcome.RETRIED):
            result.errors.append(error_of(error))
        if event.outcome in _RUNS_AGAIN:
            _set(result, status=TaskResultStatus.READY)
            self.records.save(result, event.delay_ms or 0)
            return
        if event.outcome is Outcome.DUPLICATE:
            # A finished task stays finished. After a "stale" message another run stores the end: the retry, or the run that took over.
            if result.is_finished or event.reason == "stale":
                return
            status = TaskResultStatus.SUCCESSFUL
        else:
            status = TaskResultStatus.FAILED
        _set(result, status=status, finished_at=timezone.now())
        _with_exc_info(error, functools.partial(self._finish, task, result))


def _function_of(task: Task) -> Any:
    """Return the function of a task's actor. It takes the arguments of the message, and returns JSON."""
    function, takes_context = task.func, task.takes_context

    def arguments(args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not takes_context:
            return args
        result = _running.get()
        if result is None:
            raise ConfigurationError(f"The task {task.module_path} takes its context from a worker. Call .enqueue().")
        return TaskContext(task_result=result), *args

    if is_coroutine_callable(function):

        async def run_async(*args: Any, **kwargs: Any) -> Any:
            return normalize_json(await function(*arguments(args), **kwargs))

        run: Any = run_async
    else:

        def run_sync(*args: Any, **kwargs: Any) -> Any:
            return normalize_json(function(*arguments(args), **kwargs))

        run = run_sync
    functools.update_wrapper(run, function)
    signature = inspect.signature(function)
    if takes_context:
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])
    run.__signature__ = signature
    return run


def _worker_id() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def _set(result: TaskResult, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(result, name, value)  # A TaskResult is frozen.


def _with_exc_info(error: BaseException | None, call: functools.partial[None]) -> None:
    """Call as the handler of an exception: Django's own receiver logs ``sys.exc_info()``."""
    if error is None:
        call()
        return
    stack = error.__traceback__
    try:
        raise error
    except BaseException:
        error.__traceback__ = stack
        call()
