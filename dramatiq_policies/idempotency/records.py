"""The record of a key in the store, and its bytes. Pure: no clock, no I/O. See `actions` for the rules of claims and takeovers.

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
from typing import Any, NamedTuple
from uuid import UUID

from ..errors import UnknownRecord

__all__ = ["Record", "completed_by", "released"]

_VERSION = b"\x01"
#: The beginning of the record of a completed key, for a message id that is a uuid, and for any other text.
_BY_UUID, _BY_TEXT = _VERSION + b"C", _VERSION + b"c"
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
            if data.startswith(_BY_UUID):
                return cls(COMPLETED, str(UUID(bytes=data[2:18])), args=_args_of(data[18:]))
            if data.startswith(_BY_TEXT):
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
        return _BY_UUID + bytes.fromhex(message_id.replace("-", "") + args)
    return _BY_TEXT + message_id.encode(errors="surrogatepass")


def released(record: Record, state: str, *, ended: bool, retention: int) -> Record | None:
    """Build the record of a released claim; None if there is nothing to remember."""
    runs = record.having_ended() if ended else record.ended
    if state == FREE and not runs:
        return None
    return record._replace(state=state, owner="", token="", ended=runs, retention=retention, retry=None)
