"""Production rules for Dramatiq's background jobs, declared where the job is declared."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .bundle import install
from .delivery.actor_options import ActorOptions
from .delivery.current_job import CurrentJob, current_job
from .errors import (
    ConfigurationError,
    Crashed,
    Discard,
    HandoffFailed,
    MalformedMessage,
    NoCurrentJob,
    NoResult,
    PolicyError,
    QueueTimeoutExceeded,
    Snooze,
    TimeoutExceeded,
    UnknownRecord,
    UnreadableError,
    Verdict,
)
from .middleware.discard_logger import DiscardLogger
from .middleware.error_classifier import ErrorClassifier
from .middleware.idempotency import Idempotency, KeyState
from .middleware.timeout import StuckJob, Timeout
from .outcomes import Outcome, OutcomeEvent
from .rules.backoff import constant, exponential, polynomial
from .rules.retry_after import retry_after
from .rules.rule import RetryPolicy, when

if TYPE_CHECKING:
    from ._typed_actor import actor
    from .middleware.heartbeat import Heartbeat
    from .middleware.metrics import Metrics
    from .middleware.queue_monitor import QueueAlert, QueueMonitor, Threshold
    from .middleware.sentry import SentryReporter
else:
    from dramatiq import actor

    #: On when passed only: whoever passes none of them is spared their import.
    _MODULES = {
        "Heartbeat": "heartbeat",
        "Metrics": "metrics",
        "QueueAlert": "queue_monitor",
        "QueueMonitor": "queue_monitor",
        "SentryReporter": "sentry",
        "Threshold": "queue_monitor",
    }

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f"{__name__}.middleware.{_MODULES[name]}"), name)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "ActorOptions",
    "ConfigurationError",
    "Crashed",
    "CurrentJob",
    "Discard",
    "DiscardLogger",
    "ErrorClassifier",
    "HandoffFailed",
    "Heartbeat",
    "Idempotency",
    "KeyState",
    "MalformedMessage",
    "Metrics",
    "NoCurrentJob",
    "NoResult",
    "Outcome",
    "OutcomeEvent",
    "PolicyError",
    "QueueAlert",
    "QueueMonitor",
    "QueueTimeoutExceeded",
    "RetryPolicy",
    "SentryReporter",
    "Snooze",
    "StuckJob",
    "Threshold",
    "Timeout",
    "TimeoutExceeded",
    "UnknownRecord",
    "UnreadableError",
    "Verdict",
    "actor",
    "constant",
    "current_job",
    "exponential",
    "install",
    "polynomial",
    "retry_after",
    "when",
]
