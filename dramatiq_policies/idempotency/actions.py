"""The next action for a message with a key: every rule of claims, duplicates, takeovers and quarantine. Pure: no clock, no I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .records import COMPLETED, ENDING, FREE, RUNNING, WAITING, Record

__all__ = [
    "Action",
    "Quarantine",
    "RepublishRetry",
    "Request",
    "SkipDuplicate",
    "Start",
    "WaitForOwner",
    "claimed",
    "next_action",
]


class Request(NamedTuple):
    """A message that claims its key.

    Attributes:
      message_id, run: The logical run.
      is_dead: Tells from a record whether the owner is certainly dead.
      max_crashes: After how many starts without an end the message is quarantined; None for never.
      starts: How many starts are known from elsewhere, this start included.
      alone: Whether no other job runs in this process.
      beside: Whether the job may start beside other jobs of this process, because they did not end in time.
      args: The fingerprint of the arguments; "" if unknown.
      ends_are_recorded: Whether the end of a run is recorded before its retry is published, as on RabbitMQ.
    """

    message_id: str
    run: int
    is_dead: Callable[[Record], bool]
    max_crashes: int | None = None
    starts: int = 1
    alone: bool = False
    beside: bool = False
    args: str = ""
    ends_are_recorded: bool = False


class Start(NamedTuple):
    """Run the job. With ``alone``, only while no other job runs in this process: the job may kill the process."""

    starts: int
    ended: tuple[tuple[str, int], ...] = ()
    alone: bool = False


@dataclass(frozen=True, slots=True)
class SkipDuplicate:
    """Skip the message: the first message (``first_message_id``) has ``completed`` the key, or this run has ended (``stale``).

    Attributes:
      differs: Whether the first message has other arguments.
      left: For how long the store remembers the completion, in milliseconds.
    """

    reason: str
    first_message_id: str | None = None
    differs: bool = False
    left: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class WaitForOwner:
    """Wait: another run holds the key, or a retry is due.

    Attributes:
      left: The time left of the lease, in milliseconds.
      started_at: The begin of the other run, ms since the epoch; 0 if unknown.
      message_id: The message of the other run.
      differs: Whether the other message has other arguments.
    """

    left: int
    started_at: int = field(default=0, compare=False)
    message_id: str = field(default="", compare=False)
    differs: bool = field(default=False, compare=False)


class RepublishRetry(NamedTuple):
    """Publish the retry of this ended run again: nobody knows whether the broker has accepted the retry."""

    retry: dict[str, Any]


class Quarantine(NamedTuple):
    """Quarantine the message: the job began ``starts`` times and never ended."""

    starts: int


Action = Start | SkipDuplicate | WaitForOwner | RepublishRetry | Quarantine


def next_action(record: Record | None, left: int, request: Request) -> Action:
    """Decide the next action for a message.

    Parameters:
      record: The record of the message's key; None if the store has none.
      left: How much longer the store keeps the record, in milliseconds.
    """
    if record is None:
        return _start(request.starts, (), request)
    mine = record.message_id == request.message_id
    differs = not mine and "" not in (record.args, request.args) and record.args != request.args
    if record.state == COMPLETED:
        return SkipDuplicate("completed", None if mine else record.message_id, differs, left)
    if any(message == request.message_id and request.run <= run for message, run in record.ended):
        return SkipDuplicate("stale")
    left = left - record.retention
    if record.state == FREE:
        return _start(request.starts, record.ended, request)
    if mine and request.run > record.run and not _copy_runs(record, left, request):
        # A later run of the same message exists, so the recorded run has ended.
        return _start(request.starts, record.having_ended(), request)
    if mine and request.run < record.run:
        return SkipDuplicate("stale")
    if not mine or record.state == WAITING:
        if left > 0:
            return WaitForOwner(left, record.started_at, record.message_id, differs)
        if record.state != RUNNING:
            return _start(request.starts, record.ended, request)
        # Another message with the same job may kill the worker too, but gets one start.
        return _after_a_crash(record, request, 1)
    # The same run again: the message was redelivered, or copied.
    if left > 0 and not request.is_dead(record):
        return WaitForOwner(left, record.started_at, record.message_id)
    if record.state == ENDING:
        return RepublishRetry(record.retry or {})
    return _after_a_crash(record, request, 0)


def _copy_runs(record: Record, left: int, request: Request) -> bool:
    """Return whether a copy of the message runs, although its retry is published.

    On Redis the record of the first start says nothing: the retry is published before the end is recorded. A later start is a
    copy that took over after a crash in between. On RabbitMQ a running record is always a copy's: of a run whose recorded end
    another message has replaced, after its lease.
    """
    may_be_copy = request.ends_are_recorded or record.starts > 1
    return may_be_copy and record.state == RUNNING and left > 0 and not request.is_dead(record)


def _after_a_crash(record: Record, request: Request, more: int) -> Action:
    limit = request.max_crashes
    # A limit of one start leaves no start to make alone.
    is_proof = not record.beside or limit == 1
    if limit is not None and record.starts >= limit + more and is_proof:
        return Quarantine(record.starts)
    return _start(record.starts + 1, record.ended, request)


def _start(starts: int, ended: tuple[tuple[str, int], ...], request: Request) -> Start:
    # The last allowed start is made alone: an innocent job beside a killer then survives.
    last = starts > 1 and request.max_crashes is not None and starts >= request.max_crashes
    return Start(starts, ended, alone=last and not (request.alone or request.beside))


def claimed(action: Start, request: Request, *, owner: str, token: str, started_at: int, retention: int) -> Record:
    """Build the record of a claim."""
    return Record(
        RUNNING,
        request.message_id,
        request.run,
        owner,
        token,
        started_at,
        action.starts,
        retention,
        action.ended,
        beside=not request.alone,
        args=request.args,
    )
