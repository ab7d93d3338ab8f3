"""The functions behind the command ``dramatiq-policies``, for an admin page, a script or a test."""

from __future__ import annotations

from .app import (
    OperationError,
    did_you_mean,
    find_actor,
    find_queue,
    known_queues,
    load_broker,
    one_line,
    redact,
    require_actors,
)
from .checks.actor_checks import check_actor, check_broker
from .checks.actor_summary import ActorSummary, describe
from .checks.checked_job import Settings
from .checks.findings import CODES, Code, Finding
from .checks.gate import Report, assert_job_ready, gate, read_baseline, read_exemptions, write_baseline
from .checks.live import check_live
from .dead_letters.commands import Group, MoveResult, dead_letters, move, purge, replay, summarise
from .dead_letters.dead_letter import DeadLetter, Filter
from .dead_letters.search import Tally, newest, resolve_ids
from .django_project import DJANGO, set_up_django
from .explanations.exceptions import find_exception
from .explanations.explanation import Attempt, Explanation, explain
from .keys import forget_key, key_state, read_arguments
from .outbox import (
    OutboxGroup,
    OutboxRow,
    OutboxStats,
    Selection,
    count_outbox,
    explain_no_match,
    list_outbox,
    outbox_of,
    purge_outbox,
    read_outbox,
    relay_outbox,
    retry_outbox,
    select_outbox,
)
from .queues import QueueState, monitor_of, read_outbox_row, read_queues
from .scaffolding.design import Design, IncompleteDesign, parse_design
from .scaffolding.scaffold import scaffold

__all__ = [
    "CODES",
    "DJANGO",
    "ActorSummary",
    "Attempt",
    "Code",
    "DeadLetter",
    "Design",
    "Explanation",
    "Filter",
    "Finding",
    "Group",
    "IncompleteDesign",
    "MoveResult",
    "OperationError",
    "OutboxGroup",
    "OutboxRow",
    "OutboxStats",
    "QueueState",
    "Report",
    "Selection",
    "Settings",
    "Tally",
    "app",
    "assert_job_ready",
    "check_actor",
    "check_broker",
    "check_live",
    "count_outbox",
    "dead_letters",
    "describe",
    "did_you_mean",
    "durations",
    "explain",
    "explain_no_match",
    "find_actor",
    "find_exception",
    "find_queue",
    "forget_key",
    "gate",
    "key_state",
    "known_queues",
    "list_outbox",
    "load_broker",
    "monitor_of",
    "move",
    "newest",
    "one_line",
    "outbox_of",
    "parse_design",
    "purge",
    "purge_outbox",
    "read_arguments",
    "read_baseline",
    "read_exemptions",
    "read_outbox",
    "read_outbox_row",
    "read_queues",
    "redact",
    "relay_outbox",
    "replay",
    "require_actors",
    "resolve_ids",
    "retry_outbox",
    "scaffold",
    "select_outbox",
    "set_up_django",
    "summarise",
    "write_baseline",
]
