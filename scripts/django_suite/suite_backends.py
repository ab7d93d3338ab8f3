"""DramatiqBackend in the two roles that Django's tests have a backend for."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import dramatiq

from dramatiq_policies.contrib.django.tasks import DramatiqBackend
from dramatiq_policies.testing import drain


class QueueingBackend(DramatiqBackend):
    """In the place of DummyBackend: nothing runs, and `results` is in the order of `enqueue`."""

    def __init__(self, alias: str, params: dict[str, Any]) -> None:
        super().__init__(alias, params)
        self.results: list[Any] = []

    def enqueue(self, task: Any, args: Any, kwargs: Any) -> Any:
        result = super().enqueue(task, args, kwargs)
        self.results.append(result)
        return deepcopy(result)

    def clear(self) -> None:
        broker = dramatiq.get_broker()
        broker.flush_all()
        broker.get_results_backend().results.clear()
        self.results.clear()


class RunningBackend(DramatiqBackend):
    """In the place of ImmediateBackend: a worker runs the task before `enqueue` returns."""

    def enqueue(self, task: Any, args: Any, kwargs: Any) -> Any:
        result = super().enqueue(task, args, kwargs)
        drain(dramatiq.get_broker())
        result.refresh()
        return result
