"""Make a `TaskResult` from a message, and store the result under the task's id."""

from __future__ import annotations

from dataclasses import fields
from datetime import datetime
from typing import TYPE_CHECKING, Any

from django.tasks import Task, TaskResult, TaskResultStatus
from django.tasks.base import TaskError
from django.utils.module_loading import import_string
from dramatiq import Message
from dramatiq.results import ResultBackend, ResultMissing, Results

from ...common.middleware import find_middleware
from ...common.safe_logger import SafeLogger
from ...delivery.tracebacks import traceback_of
from ...outcomes import class_path, text_of

if TYPE_CHECKING:
    from dramatiq.broker import Broker

__all__ = ["OPTION", "TaskRecords", "error_of", "option_of", "result_of"]

logger = SafeLogger("dramatiq_policies.django")

#: The message option with the fields of a task. A message has no place for these fields.
OPTION = "django_task"
#: The shortest time to keep the result of a waiting or running task: a day, in milliseconds.
_UNFINISHED_TTL = 86_400_000
_TIMES = ("enqueued_at", "started_at", "finished_at", "last_attempted_at")
_UNFINISHED = (TaskResultStatus.READY, TaskResultStatus.RUNNING)


def option_of(task: Task, enqueued_at: datetime) -> dict[str, Any]:
    """Return the message option of a task."""
    return {
        "backend": task.backend,
        "priority": task.priority,
        "run_after": _text(task.run_after),
        "enqueued_at": _text(enqueued_at),
    }


def result_of(task: Task, message: Message[Any], queue_name: str, **changes: Any) -> TaskResult:
    """Return the result of a waiting message.

    Parameters:
      task: The task of the message's actor. The message may carry other defaults.
      queue_name: The message's queue, never its delay queue.
    """
    given = message.options.get(OPTION)
    option: dict[str, Any] = given if isinstance(given, dict) else {}
    sent = _variant(
        task,
        backend=option.get("backend", task.backend),
        priority=option.get("priority", task.priority),
        queue_name=queue_name,
        run_after=_time(option.get("run_after")),
    )
    values = {
        "status": TaskResultStatus.READY,
        "enqueued_at": _time(option.get("enqueued_at")) or message.message_datetime,
        "started_at": None,
        "finished_at": None,
        "last_attempted_at": None,
        "errors": [],
        "worker_ids": [],
        **changes,
    }
    arguments = {"args": list(message.args), "kwargs": message.kwargs}
    return TaskResult(task=sent, id=message.message_id, backend=sent.backend, **arguments, **values)


def error_of(error: BaseException) -> TaskError:
    text = traceback_of(error) or f"{class_path(type(error))}: {text_of(error)}\n"
    return TaskError(exception_class_path=class_path(type(error)), traceback=text)


class TaskRecords:
    """The stored results of a broker's tasks, in the backend of its ``Results``.

    Dramatiq names a result by queue, actor and id. Callers of ``get_result`` know the id only.
    """

    def __init__(self, broker: Broker) -> None:
        self.broker = broker

    def backend(self) -> ResultBackend | None:
        """Return the result backend of the broker, or None."""
        results = self._results()
        return None if results is None else results.backend

    def are_kept_for(self, task: Task) -> bool:
        """Whether the results of a task are stored."""
        return self._ttl(task) is not None

    def load(self, result_id: str) -> TaskResult | None:
        """Return a stored result, or None.

        Raises:
          ImportError: The task of the result is gone.
        """
        backend = self.backend()
        try:
            record = None if backend is None else backend.get_result(_stored_at(result_id))
        except ResultMissing:
            return None
        return None if record is None else _from_record(result_id, record)

    def find(self, task: Task, result_id: str) -> TaskResult | None:
        """Return a task's stored result; None without a result, or after an error. Never raises."""
        try:
            return self.load(result_id) if self.are_kept_for(task) else None
        except Exception as error:
            logger.warning("The result of task %s can't be read: %s", result_id, error)
            return None

    def save(self, result: TaskResult, delay: int = 0) -> None:
        """Store a result, if the task stores results. Never raises: an error must not stop the task.

        Parameters:
          delay: How long the task waits before it is ready, in milliseconds.
        """
        ttl, backend = self._ttl(result.task), self.backend()
        if ttl is None or backend is None:
            return
        if result.status in _UNFINISHED:
            ttl = delay + max(ttl, _UNFINISHED_TTL)
        try:
            backend.store_result(_stored_at(result.id), _to_record(result), ttl)
        except Exception as error:
            logger.warning(
                "The state %s of task %s can't be stored (%s). The task goes on.", result.status, result.id, error
            )

    def _results(self) -> Results | None:
        return find_middleware(self.broker, Results)

    def _ttl(self, task: Task) -> int | None:
        """Return how long to keep the result of a task, in milliseconds; None for a task without stored results."""
        results, actor = self._results(), self.broker.actors.get(task.module_path)
        if results is None or actor is None or not actor.options.get("store_results", results.store_results):
            return None
        ttl: int = actor.options.get("result_ttl", results.result_ttl)
        return ttl


def _stored_at(result_id: str) -> Message[Any]:
    """Return a message for Dramatiq's result backend. The record of a task is stored as the result of this message."""
    return Message("default", "django.tasks", (), {}, {}, message_id=str(result_id))


def _to_record(result: TaskResult) -> dict[str, Any]:
    task = result.task
    return {
        "task": task.module_path,
        "priority": task.priority,
        "queue_name": task.queue_name,
        "run_after": _text(task.run_after),
        "backend": result.backend,
        "args": result.args,
        "kwargs": result.kwargs,
        "status": str(result.status),
        "errors": [[error.exception_class_path, error.traceback] for error in result.errors],
        "worker_ids": result.worker_ids,
        "return_value": result._return_value,  # noqa: SLF001 - Django's own backends write it, too
        **{name: _text(getattr(result, name)) for name in _TIMES},
    }


def _from_record(result_id: str, record: dict[str, Any]) -> TaskResult:
    task = _variant(
        import_string(record["task"]),
        priority=record["priority"],
        queue_name=record["queue_name"],
        run_after=_time(record["run_after"]),
        backend=record["backend"],
    )
    result = TaskResult(
        task=task,
        id=result_id,
        status=TaskResultStatus(record["status"]),
        args=record["args"],
        kwargs=record["kwargs"],
        backend=record["backend"],
        errors=[TaskError(exception_class_path=path, traceback=text) for path, text in record["errors"]],
        worker_ids=record["worker_ids"],
        **{name: _time(record[name]) for name in _TIMES},
    )
    object.__setattr__(result, "_return_value", record["return_value"])
    return result


def _variant(task: Task, **changes: Any) -> Task:
    """Copy a task. Not by ``using()``, which checks the task against the settings of today."""
    made = object.__new__(type(task))
    for field in fields(task):
        object.__setattr__(made, field.name, changes.get(field.name, getattr(task, field.name)))
    return made


def _text(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat()


def _time(text: Any) -> datetime | None:
    try:
        return None if text is None else datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
