"""What the command ``dramatiq-policies`` does, as functions: for an admin page, a script, a test."""

from __future__ import annotations

from .apps import OperationError, find_actor, find_queue, known_queues, load_broker, one_line, redact
from .checks import Settings, check_actor, check_broker
from .explanations import Attempt, Explanation, Portrait, describe, explain, find_exception
from .findings import CODES, Code, Finding
from .gate import Report, assert_job_ready, gate, read_baseline, read_exemptions, write_baseline

__all__ = [
    "CODES",
    "Attempt",
    "Code",
    "Explanation",
    "Finding",
    "OperationError",
    "Portrait",
    "Report",
    "Settings",
    "assert_job_ready",
    "check_actor",
    "check_broker",
    "describe",
    "explain",
    "find_actor",
    "find_exception",
    "find_queue",
    "gate",
    "known_queues",
    "load_broker",
    "one_line",
    "read_baseline",
    "read_exemptions",
    "redact",
    "write_baseline",
]
