"""Production rules for Dramatiq's background jobs, declared where the job is declared."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .backoff import constant, exponential, polynomial, retry_after
from .bundle import install
from .delivery import CurrentJob, current_job
from .errors import (
    ConfigurationError,
    Crashed,
    Discard,
    HandoffFailed,
    MalformedMessage,
    NoResult,
    PolicyError,
    QueueTimeoutExceeded,
    Snooze,
    TimeoutExceeded,
    UnknownRecord,
    Verdict,
)
from .middleware.discard_logger import DiscardLogger
from .middleware.error_classifier import ErrorClassifier
from .middleware.heartbeat import Heartbeat
from .middleware.idempotency import Idempotency, KeyState
from .middleware.metrics import Metrics
from .middleware.queue_monitor import QueueAlert, QueueMonitor, Threshold
from .middleware.sentry import SentryReporter
from .middleware.timeout import StuckJob, Timeout
from .options import ActorOptions
from .outcomes import Outcome, OutcomeEvent
from .rules import RetryPolicy, when

if TYPE_CHECKING:
    from ._typed_actor import actor
else:
    from dramatiq import actor

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
