"""The backend of Django's tasks."""

from __future__ import annotations

import math
import re
import time
from typing import Any

import dramatiq
from django.tasks import Task, TaskResult
from django.tasks.backends.base import BaseTaskBackend
from django.tasks.base import TASK_MAX_PRIORITY, TASK_MIN_PRIORITY
from django.tasks.exceptions import InvalidTask, InvalidTaskBackend, TaskResultDoesNotExist
from django.tasks.signals import task_enqueued
from django.utils import timezone
from django.utils.module_loading import import_string
from dramatiq.broker import Broker
from dramatiq.middleware.asyncio import AsyncIO

from ...common.callables import is_coroutine_callable
from ...errors import how_to_add
from .task_records import OPTION, TaskRecords, option_of, result_of
from .task_runs import runs_of

__all__ = ["DramatiqBackend"]

#: A queue's name, as Dramatiq's decorator demands.
_QUEUE = re.compile(r"[a-zA-Z_][a-zA-Z0-9._-]*")


class DramatiqBackend(BaseTaskBackend):  # type: ignore[misc]
    """Runs Django's tasks on Dramatiq's workers, by the rules of dramatiq_policies.

    ::

        TASKS = {
            "default": {
                "BACKEND": "dramatiq_policies.contrib.django.tasks.DramatiqBackend",
                "QUEUES": ["default", "mail"],
            }
        }

    The backend uses Dramatiq's global broker: django_dramatiq makes the broker from your settings. Each task is an actor with
    the name of the task's function, such as ``shop.tasks.send_welcome``. `policy` gives the actor its options.

    - ``QUEUES``: the queues of tasks and workers. Default ``["default"]``. With ``[]`` a task may use any queue, and a worker
      reads the queues of the imported tasks.
    - ``run_after`` becomes a delay in milliseconds, counted from `enqueue`.
    - ``priority``: with ``max_priority`` on a RabbitmqBroker, -100 to 100 becomes 0 to ``max_priority``. Elsewhere a worker
      sorts the fetched messages by the priority in ``@task``.
    - An async task needs Dramatiq's ``AsyncIO`` middleware.
    - ``get_result`` needs Dramatiq's ``Results`` on the broker, and ``store_results`` on the actor or on ``Results``. The
      backend keeps a result for ``result_ttl`` after the end of the task.

    A retried task is READY again. The worker sends ``task_finished`` after the last attempt.

    Raises:
      InvalidTaskBackend: The setting has ``OPTIONS``.
    """

    supports_defer = True
    supports_async_task = True
    supports_priority = True

    def __init__(self, alias: str, params: dict[str, Any]) -> None:
        super().__init__(alias, params)
        if self.options:
            raise InvalidTaskBackend(
                f"DramatiqBackend {alias!r} takes no OPTIONS. Give rules by @policy, and settings to the broker."
            )

    @property
    def supports_get_result(self) -> bool:
        """Whether the broker has Dramatiq's ``Results``."""
        return TaskRecords(dramatiq.get_broker()).backend() is not None

    def validate_task(self, task: Task) -> None:
        """Check a task, and declare its actor.

        Raises:
          InvalidTask: The task can't run on this backend.
          ConfigurationError: An option of `policy` is wrong, or the broker has no middleware of dramatiq_policies.
        """
        super().validate_task(task)
        broker = dramatiq.get_broker()
        if _QUEUE.fullmatch(task.queue_name) is None:
            raise InvalidTask(f"Queue '{task.queue_name}' is not a name that Dramatiq accepts: {_QUEUE.pattern}")
        if is_coroutine_callable(task.func) and not _runs_coroutines(broker):
            add = how_to_add("'dramatiq.middleware.AsyncIO'", "broker.add_middleware(AsyncIO())")
            raise InvalidTask(f"An async task needs Dramatiq's AsyncIO middleware. {add}.")
        self._refuse_task_of_another_backend(task)
        runs_of(broker).actor_of(task)
        for queue in {task.queue_name, *self.queues}:
            broker.declare_queue(queue)

    def enqueue(self, task: Task, args: Any, kwargs: Any) -> TaskResult:
        """Send the message of a task.

        Inside a transaction of an outbox's database, the message is a row of the transaction.

        Raises:
          InvalidTask: The task can't run on this backend.
          TypeError: An argument is not JSON.
        """
        self.validate_task(task)
        broker = dramatiq.get_broker()
        runs, now = runs_of(broker), timezone.now()
        options: dict[str, Any] = {OPTION: option_of(task, now)}
        most = getattr(broker, "max_priority", None)
        if most:
            share = (task.priority - TASK_MIN_PRIORITY) / (TASK_MAX_PRIORITY - TASK_MIN_PRIORITY)
            options["broker_priority"] = round(share * most)
        message = runs.actor_of(task).message_with_options(args=tuple(args), kwargs=dict(kwargs), **options)
        result = result_of(task, message, task.queue_name)
        delay = None
        if task.run_after is not None:
            # By the real time, as `run_after` is.
            delay = max(0, math.ceil((task.run_after.timestamp() - time.time()) * 1_000)) or None
        runs.save_new(result, message, delay or 0)
        broker.enqueue(
            message.copy(queue_name=task.queue_name, args=tuple(result.args), kwargs=result.kwargs), delay=delay
        )
        task_enqueued.send(type(self), task_result=result)
        return result

    def get_result(self, result_id: str) -> TaskResult:
        """Return the result of a task.

        Raises:
          TaskResultDoesNotExist: No result is stored under this id: the id is unknown, the task stores no results, or the
            result has expired.
          NotImplementedError: The broker has no ``Results``.
        """
        records = TaskRecords(dramatiq.get_broker())
        if records.backend() is None:
            return super().get_result(result_id)
        try:
            found = records.load(result_id)
        except ImportError as error:
            raise TaskResultDoesNotExist(result_id) from error
        if found is None:
            raise TaskResultDoesNotExist(result_id)
        return found

    def _refuse_task_of_another_backend(self, task: Task) -> None:
        """Refuse ``using(backend=…)`` on a task of another backend: the worker's import would declare no actor."""
        try:
            declared = import_string(task.module_path)
        except ImportError:
            return  # It is being declared.
        if isinstance(declared, Task) and not isinstance(declared.get_backend(), DramatiqBackend):
            raise InvalidTask(
                f"The task {task.module_path} is declared for the backend {declared.backend!r}, so that no worker of "
                f"Dramatiq knows it. Declare it with @task(backend={task.backend!r})."
            )


def _runs_coroutines(broker: Broker) -> bool:
    return any(isinstance(middleware, AsyncIO) for middleware in broker.middleware)
