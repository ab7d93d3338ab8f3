"""The current job of this thread, greenlet or task, for packages that must not import `delivery`."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from dramatiq import Message

__all__ = ["Job", "current", "running_job"]


class Job(Protocol):
    """The attributes of a `Delivery` for these packages."""

    message: Message[Any]
    timeout_ms: float | None

    @property
    def is_running(self) -> bool: ...

    def elapsed_ms(self) -> float: ...


#: Set by ErrorClassifier before a message is processed, and reset afterwards.
current: ContextVar[Job | None] = ContextVar("dramatiq_policies_delivery", default=None)


def running_job() -> Job | None:
    """Return the running job, or None outside of a job."""
    job = current.get()
    return job if job is not None and job.is_running else None
