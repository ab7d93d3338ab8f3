"""The record of a key in the store, and the next action for a message with this key. Pure: no clock, no I/O.

A record is bytes that begin with a version. The record of a completed key is short, because a store keeps millions of
them for a day: the version, a letter, the 16 bytes of the first message's id, and the 4 bytes of its arguments' fingerprint if the
key leaves arguments out. All other states are short-lived JSON.

A record lives ``retention`` milliseconds longer than its lease, so that the history of earlier runs outlasts the run. The time
left of a lease is the time left of the record less ``retention``. Only the store's clock counts.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

from ..errors import UnknownRecord

__all__ = [
    "Quarantine",
    "Record",
    "RepublishRetry",
    "Request",
    "SkipDuplicate",
    "Start",
    "WaitForOwner",
    "completed_by",
    "next_action",
]

_VERSION = b"\x01"
_KEPT = 8
# json.dumps() would create an encoder in each call.
_json = json.JSONEncoder(separators=(",", ":")).encode
_quoted = json.encoder.encode_basestring_ascii
#: A uuid in Dramatiq's notation: the 16 bytes give back the same text.
_UUID = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")

#: States of a key: a job runs; the run has ended and its retry is being published; the retry is due; nobody holds the key.
RUNNING, ENDING, WAITING, FREE = "running", "ending", "waiting", "free"
COMPLETED = "completed"


class Record(NamedTuple):
    """The state of one key.

    Attributes:
      state: ``completed``, ``running``, ``ending``, ``waiting`` or ``free``.
      message_id: The message that holds or has completed the key.
      run: The logical run of the message (see `history.run_of`).
      owner: The process that runs the job.
      token: Makes the bytes of each claim unique.
      started_at: The begin of the run, ms since the epoch, by the owner's clock. Only for display.
      starts: How many starts of this run are known, this start included.
      retention: How much longer than its lease the record lives, in milliseconds.
      ended: Runs that have ended, the last run of each message.
      retry: In state ``ending``, the message options and the due time of the retry that is being published.
      beside: Whether other jobs ran in the process at the start, so that a crash proves nothing. None in a record
        of 0.1.0.
      args: The fingerprint of the message's arguments; "" if unknown.
    """

    state: str
    message_id: str = ""
    run: int = 0
    owner: str = ""
    token: str = ""
    started_at: int = 0
    starts: int = 1
    retention: int = 0
    ended: tuple[tuple[str, int], ...] = ()
    retry: dict[str, Any] | None = None
    beside: bool | None = None
    args: str = ""

    def encode(self) -> bytes:
        if self.state == COMPLETED:
            return completed_by(self.message_id, self.args)
        # Each job writes a record. Built by hand, a record takes a quarter of the time.
        ended = _json(self.ended) if self.ended else "[]"
        retry = "" if self.retry is None else f',"f":{_json(self.retry)}'
        beside = "" if self.beside is None else f',"x":{self.beside:d}'
        args = f',"a":{_quoted(self.args)}' if self.args else ""
        return (
            _VERSION
            + (
                f'{{"s":{_quoted(self.state)},"m":{_quoted(self.message_id)},"n":{self.run},"o":{_quoted(self.owner)},'
                f'"t":{_quoted(self.token)},"b":{self.started_at},"c":{self.starts},"k":{self.retention},"e":{ended}{beside}{args}{retry}}}'
            ).encode()
        )

    @classmethod
    def decode(cls, data: bytes) -> Record:
        """Read a record.

        Raises:
          UnknownRecord: Another version of this library, or another program, has written the bytes.
        """
        try:
            if data[:1] != _VERSION:
                raise ValueError("unknown version")
            if data[1:2] == b"C":
                return cls(COMPLETED, str(UUID(bytes=data[2:18])), args=_args_of(data[18:]))
            if data[1:2] == b"c":
                return cls(COMPLETED, data[2:].decode(errors="surrogatepass"))
            f = json.loads(data[1:])
            if f["s"] not in (RUNNING, ENDING, WAITING, FREE):
                raise ValueError("unknown state")
            numbers = [operator.index(f[name]) for name in "nbck"]
            ended = tuple((str(message), operator.index(run)) for message, run in f["e"])
            run, started_at, starts, retention = numbers
            beside = None if f.get("x") is None else bool(f["x"])
            return cls(
                f["s"],
                str(f["m"]),
                run,
                str(f["o"]),
                str(f["t"]),
                started_at,
                starts,
                retention,
                ended,
                f.get("f"),
                beside,
                str(f.get("a", "")),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UnknownRecord(
                f"The store holds {data[:40]!r} where a record of this version of dramatiq_policies should "
                f"be ({error}). Jobs with this key wait until the record has expired or you delete it "
                "(dramatiq-policies keys forget). If workers of a newer version share the store, update "
                "this worker."
            ) from None

    def having_ended(self) -> tuple[tuple[str, int], ...]:
        """Return the ended runs, this run included."""
        others = [(message, run) for message, run in self.ended if message != self.message_id]
        return (*others, (self.message_id, self.run))[-_KEPT:]


def _args_of(data: bytes) -> str:
    if len(data) not in (0, 4):
        raise ValueError("unknown length")
    return data.hex()


def completed_by(message_id: str, args: str = "") -> bytes:
    """Encode the record of a completed key.

    Parameters:
      args: The fingerprint of the first message's arguments. 0.1.0 does not read records with a fingerprint.
    """
    if _UUID.fullmatch(message_id):
        return _VERSION + b"C" + bytes.fromhex(message_id.replace("-", "") + args)
    return _VERSION + b"c" + message_id.encode(errors="surrogatepass")


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


class SkipDuplicate(NamedTuple):
    """Skip the message: the first message (``first_message_id``) has ``completed`` the key, or this run has ended (``stale``).

    With ``differs``, the first message has other arguments.
    """

    reason: str
    first_message_id: str | None = None
    differs: bool = False


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
        return SkipDuplicate("completed", None if mine else record.message_id, differs)
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


def released(record: Record, state: str, *, ended: bool, retention: int) -> Record | None:
    """Build the record of a released claim; None if there is nothing to remember."""
    runs = record.having_ended() if ended else record.ended
    if state == FREE and not runs:
        return None
    return record._replace(state=state, owner="", token="", ended=runs, retention=retention, retry=None)
