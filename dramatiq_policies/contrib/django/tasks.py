"""Django's tasks on Dramatiq: the backend for ``TASKS``, and `policy` for the rules of a task.

Django 6 and newer::

    # settings.py
    TASKS = {"default": {"BACKEND": "dramatiq_policies.contrib.django.tasks.DramatiqBackend", "QUEUES": ["default", "mail"]}}

    # tasks.py of an app
    from django.tasks import task
    from dramatiq_policies import RetryPolicy
    from dramatiq_policies.contrib.django.tasks import policy

    @task(queue_name="mail")
    @policy(retry_on={SMTPException: RetryPolicy(attempts=5)}, idempotency_key="welcome:{user_id}")
    def send_welcome(user_id): ...

    send_welcome.enqueue(user.pk)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .task_policy import policy

if TYPE_CHECKING:
    from .task_backend import DramatiqBackend
else:
    # rundramatiq imports the tasks.py of each installed app, this one too, also where Django has no tasks.
    def __getattr__(name: str) -> Any:
        if name != "DramatiqBackend":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            from .task_backend import DramatiqBackend
        except ModuleNotFoundError as error:
            if error.name != "django.tasks":
                raise
            raise ImportError('DramatiqBackend needs Django 6: pip install "Django>=6.0"') from error
        return DramatiqBackend


__all__ = ["DramatiqBackend", "policy"]
