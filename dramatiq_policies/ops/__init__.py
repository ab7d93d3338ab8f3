"""What the command ``dramatiq-policies`` does, as functions: for an admin page, a script, a test."""

from __future__ import annotations

from .apps import (
    OperationError,
    find_actor,
    find_queue,
    known_queues,
    load_broker,
    meant,
    one_line,
    redact,
    require_actors,
)
from .checks import Settings, check_actor, check_broker
from .dead import Group, Moved, dead_letters, move, purge, replay, summarise
from .designs import Design, IncompleteDesign, parse_design
from .django_project import DJANGO, set_up_django
from .exceptions import find_exception
from .explanations import Attempt, Explanation, explain
from .findings import CODES, Code, Finding
from .found import Tally, newest, resolve_ids
from .gate import Report, assert_job_ready, gate, read_baseline, read_exemptions, write_baseline
from .keys import forget_key, key_state, read_arguments
from .letters import DeadLetter, Filter
from .live import check_live
from .portraits import Portrait, describe
from .queues import QueueState, monitor_of, read_queues
from .scaffold import scaffold

__all__ = [
    "CODES",
    "DJANGO",
    "Attempt",
    "Code",
    "DeadLetter",
    "Design",
    "Explanation",
    "Filter",
    "Finding",
    "Group",
    "IncompleteDesign",
    "Moved",
    "OperationError",
    "Portrait",
    "QueueState",
    "Report",
    "Settings",
    "Tally",
    "assert_job_ready",
    "check_actor",
    "check_broker",
    "check_live",
    "dead_letters",
    "describe",
    "explain",
    "find_actor",
    "find_exception",
    "find_queue",
    "forget_key",
    "gate",
    "key_state",
    "known_queues",
    "load_broker",
    "meant",
    "monitor_of",
    "move",
    "newest",
    "one_line",
    "parse_design",
    "purge",
    "read_arguments",
    "read_baseline",
    "read_exemptions",
    "read_queues",
    "redact",
    "replay",
    "require_actors",
    "resolve_ids",
    "scaffold",
    "set_up_django",
    "summarise",
    "write_baseline",
]
