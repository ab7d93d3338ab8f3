"""What the command ``dramatiq-policies`` does, as functions: for an admin page, a script, a test."""

from __future__ import annotations

from .apps import OperationError, find_actor, find_queue, known_queues, load_broker, meant, one_line, redact
from .checks import Settings, check_actor, check_broker
from .dead import Group, Moved, dead_letters, move, purge, replay, summarise
from .explanations import Attempt, Explanation, Portrait, describe, explain, find_exception
from .findings import CODES, Code, Finding
from .gate import Report, assert_job_ready, gate, read_baseline, read_exemptions, write_baseline
from .letters import DeadLetter, Filter

__all__ = [
    "CODES",
    "Attempt",
    "Code",
    "DeadLetter",
    "Explanation",
    "Filter",
    "Finding",
    "Group",
    "Moved",
    "OperationError",
    "Portrait",
    "Report",
    "Settings",
    "assert_job_ready",
    "check_actor",
    "check_broker",
    "dead_letters",
    "describe",
    "explain",
    "find_actor",
    "find_exception",
    "find_queue",
    "gate",
    "known_queues",
    "load_broker",
    "meant",
    "move",
    "one_line",
    "purge",
    "read_baseline",
    "read_exemptions",
    "redact",
    "replay",
    "summarise",
    "write_baseline",
]
