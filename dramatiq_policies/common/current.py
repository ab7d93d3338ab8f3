"""The job that runs in this thread, greenlet or task, for packages that know nothing of deliveries."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from dramatiq import Message

__all__ = ["Job", "current", "running_job"]


class Job(Protocol):
    """The part of a `Delivery` that these packages read."""

    message: Message[Any]
    timeout_ms: float | None

    @property
    def is_running(self) -> bool: ...

    def elapsed_ms(self) -> float: ...


#: Set by ErrorClassifier before a message is processed, and reset afterwards.
current: ContextVar[Job | None] = ContextVar("dramatiq_policies_delivery", default=None)


def running_job() -> Job | None:
    """Return the job that runs here; None outside of a job."""
    job = current.get()
    return job if job is not None and job.is_running else None
