"""What a store remembers of a key, and what follows from it for a message that asks: pure, no clock, no I/O.

A record is bytes that begin with their version. A completed key is the version, a letter and the 16 bytes of the id of
the message that completed it: it is kept for a day, times a million. All other states are short-lived JSON.

A record lives ``keep`` milliseconds longer than its lease, so that what is known of earlier runs outlasts the run: how
much of a lease is left is what is left of the record, less ``keep``. Only the store's clock is asked.
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
# json.dumps() makes an encoder for each call.
_json = json.JSONEncoder(separators=(",", ":")).encode
_quoted = json.encoder.encode_basestring_ascii
#: A uuid as Dramatiq writes it, which can be written anew from its bytes.
_UUID = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")

#: States of a key: being run; its run has ended and a retry is being handed on; waiting for that retry; not held.
RUNNING, ENDING, WAITING, FREE = "running", "ending", "waiting", "free"
COMPLETED = "completed"


class Record(NamedTuple):
    """What is known of one key.

    Attributes:
      state: ``completed``, ``running``, ``ending``, ``waiting`` or ``free``.
      message_id: Whose it is, or who completed it.
      run: Which logical run of that message (see `history.run_of`).
      owner: The process that runs it.
      token: Makes every claim's bytes different from those of any other.
      since: When the run began, ms since the epoch, by the owner's clock; to be looked at only.
      starts: How many starts of this run are known, this one included.
      keep: How much longer than its lease the record lives, in milliseconds.
      ended: Runs that have ended, the last of each message.
      follow: ``ending``: the message options and the time of the retry that is being handed on.
      beside: Whether other jobs ran in the process at that start, so that its crash proves nothing. None in a record
        of 0.1.0.
    """

    state: str
    message_id: str = ""
    run: int = 0
    owner: str = ""
    token: str = ""
    since: int = 0
    starts: int = 1
    keep: int = 0
    ended: tuple[tuple[str, int], ...] = ()
    follow: dict[str, Any] | None = None
    beside: bool | None = None

    def encode(self) -> bytes:
        if self.state == COMPLETED:
            return completed_by(self.message_id)
        # One is written for each job: by hand it takes a quarter of the time.
        ended = _json(self.ended) if self.ended else "[]"
        follow = "" if self.follow is None else f',"f":{_json(self.follow)}'
        beside = "" if self.beside is None else f',"x":{self.beside:d}'
        return (
            _VERSION
            + (
                f'{{"s":{_quoted(self.state)},"m":{_quoted(self.message_id)},"n":{self.run},"o":{_quoted(self.owner)},'
                f'"t":{_quoted(self.token)},"b":{self.since},"c":{self.starts},"k":{self.keep},"e":{ended}{beside}{follow}}}'
            ).encode()
        )

    @classmethod
    def decode(cls, data: bytes) -> Record:
        """Read a record.

        Raises:
          UnknownRecord: It was written by another version of this library, or by somebody else.
        """
        try:
            if data[:1] != _VERSION:
                raise ValueError("unknown version")
            if data[1:2] == b"C":
                return cls(COMPLETED, str(UUID(bytes=data[2:])))
            if data[1:2] == b"c":
                return cls(COMPLETED, data[2:].decode(errors="surrogatepass"))
            f = json.loads(data[1:])
            if f["s"] not in (RUNNING, ENDING, WAITING, FREE):
                raise ValueError("unknown state")
            numbers = [operator.index(f[name]) for name in "nbck"]
            ended = tuple((str(message), operator.index(run)) for message, run in f["e"])
            run, since, starts, keep = numbers
            beside = None if f.get("x") is None else bool(f["x"])
            return cls(
                f["s"],
                str(f["m"]),
                run,
                str(f["o"]),
                str(f["t"]),
                since,
                starts,
                keep,
                ended,
                f.get("f"),
                beside,
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UnknownRecord(
                f"The store holds {data[:40]!r} where a record of this version of dramatiq_policies should be ({error}). "
                "Nothing runs under this key until it has expired or was forgotten; if workers of a newer version "
                "share the store, update this one."
            ) from None

    def having_ended(self) -> tuple[tuple[str, int], ...]:
        """The runs that have ended once this one has."""
        others = [(message, run) for message, run in self.ended if message != self.message_id]
        return (*others, (self.message_id, self.run))[-_KEPT:]


def completed_by(message_id: str) -> bytes:
    """The record of a completed key."""
    if _UUID.fullmatch(message_id):
        return _VERSION + b"C" + bytes.fromhex(message_id.replace("-", ""))
    return _VERSION + b"c" + message_id.encode(errors="surrogatepass")


class Request(NamedTuple):
    """A message that asks for its key.

    Attributes:
      message_id, run: Which logical run.
      is_dead: Whether an owner, given the record, is certainly dead.
      max_crashes: After how many starts that never ended it is quarantined; None for never.
      starts: How many starts are known from elsewhere, this one included.
      alone: Whether nothing else runs in this process.
      beside: Whether it may start although others run in this process: they would not end in time.
    """

    message_id: str
    run: int
    is_dead: Callable[[Record], bool]
    max_crashes: int | None = None
    starts: int = 1
    alone: bool = False
    beside: bool = False


class Start(NamedTuple):
    """Run it. ``alone``: only if nothing else runs in this process, for it may be what kills it."""

    starts: int
    ended: tuple[tuple[str, int], ...] = ()
    alone: bool = False


class SkipDuplicate(NamedTuple):
    """It has been done (``completed``; by which message) or this run of it has ended (``stale``)."""

    reason: str
    twin: str | None = None


@dataclass(frozen=True, slots=True)
class WaitForOwner:
    """Somebody else runs it, or will.

    Attributes:
      left: What is left of that lease in milliseconds.
      since: When that run began, ms since the epoch; 0 where that is not known.
      message_id: Whose run it is.
    """

    left: int
    since: int = field(default=0, compare=False)
    message_id: str = field(default="", compare=False)


class RepublishRetry(NamedTuple):
    """This run has ended; whether its retry was accepted is not known, so it is handed on once more."""

    follow: dict[str, Any]


class Quarantine(NamedTuple):
    """It began this many times and never ended."""

    starts: int


Action = Start | SkipDuplicate | WaitForOwner | RepublishRetry | Quarantine


def next_action(record: Record | None, left: int, request: Request) -> Action:
    """What becomes of a message whose key holds ``record``, which is kept for ``left`` more milliseconds."""
    if record is None:
        return _take(request.starts, (), request)
    mine = record.message_id == request.message_id
    if record.state == COMPLETED:
        return SkipDuplicate("completed", None if mine else record.message_id)
    if any(message == request.message_id and request.run <= run for message, run in record.ended):
        return SkipDuplicate("stale")
    left = left - record.keep
    if record.state == FREE:
        return _take(request.starts, record.ended, request)
    if mine and request.run > record.run:
        # A later run of the same message exists, so that one has ended.
        return _take(request.starts, record.having_ended(), request)
    if mine and request.run < record.run:
        return SkipDuplicate("stale")
    if not mine or record.state == WAITING:
        if left > 0:
            return WaitForOwner(left, record.since, record.message_id)
        if record.state != RUNNING:
            return _take(request.starts, record.ended, request)
        # The same job in another message, which may kill its worker, too; but it is granted one start of its own.
        return _after_a_crash(record, request, 1)
    # The very same run once more: redelivered, or a copy of it.
    if left > 0 and not request.is_dead(record):
        return WaitForOwner(left, record.since, record.message_id)
    if record.state == ENDING:
        return RepublishRetry(record.follow or {})
    return _after_a_crash(record, request, 0)


def _after_a_crash(record: Record, request: Request, more: int) -> Action:
    limit = request.max_crashes
    # A limit of one leaves no start to be made alone.
    is_proof = not record.beside or limit == 1
    if limit is not None and record.starts >= limit + more and is_proof:
        return Quarantine(record.starts)
    return _take(record.starts + 1, record.ended, request)


def _take(starts: int, ended: tuple[tuple[str, int], ...], request: Request) -> Start:
    # The last start that it is granted. Those that only ran beside a killer do not die of this one.
    last = starts > 1 and request.max_crashes is not None and starts >= request.max_crashes
    return Start(starts, ended, alone=last and not (request.alone or request.beside))


def taken(action: Start, request: Request, *, owner: str, token: str, since: int, keep: int) -> Record:
    """The record of a claim."""
    return Record(
        RUNNING,
        request.message_id,
        request.run,
        owner,
        token,
        since,
        action.starts,
        keep,
        action.ended,
        beside=not request.alone,
    )


def released(record: Record, state: str, *, ended: bool, keep: int) -> Record | None:
    """The record of a claim that is given up; None if there is nothing to remember."""
    runs = record.having_ended() if ended else record.ended
    if state == FREE and not runs:
        return None
    return record._replace(state=state, owner="", token="", ended=runs, keep=keep, follow=None)
