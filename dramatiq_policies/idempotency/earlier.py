"""Records that 0.1.0 wrote under another register name. They count until they expire.

0.1.0 named a register by the text of the key. If the name has changed since (see `keys`), two jobs may have shared the old
register, and one of the two still uses the old name. So a record in the old register counts only if 0.1.0 wrote the record.
A claim of 0.1.0 has no ``beside``. A completion has no such sign, and counts if older than the mark that the first worker of
a newer version leaves in the store. The mark also says whether the store was empty then. If so, nobody
looks for records of 0.1.0, and no record has to be readable for 0.1.0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..common import clock
from ..common.durations import CENTURY_MS, WEEK_MS
from ..stores import Entry, IdempotencyStore
from . import records
from .keys import typed_name
from .records import Record

__all__ = ["Completion", "EarlierRecords"]

#: Value and ttl of a register; then of its companion, if it has one.
Completion = tuple[bytes, int] | tuple[bytes, int, bytes, int]

#: The register of the mark. The elapsed part of the ttl gives the age.
_MARK = typed_name(("#", "version 2"))
#: The content of the mark: 0.1.0 may have used the store before, or has not.
_USED, _EMPTY = b"2", b"2 empty"
#: For how long, in milliseconds, records of 0.1.0 may outlast their ttl: a record may wait for a retry, and old workers
#: write records as long as they are deployed.
_LATER = 2 * WEEK_MS
#: For how long, in milliseconds, other processes know the arguments of a completed key.
_COMPANION_TTL = 3_600_000
#: How many fingerprints this process remembers.
_REMEMBERED = 10_000


class EarlierRecords:
    """The records of 0.1.0 in one store.

    Parameters:
      store: The store.
      call_store: Calls the store; raises `StoreDown` if the call fails.
    """

    def __init__(self, store: IdempotencyStore, call_store: Callable[[Callable[[], Any]], Any]) -> None:
        self.store = store
        self.call_store = call_store
        self._takes_companions: bool = getattr(store, "takes_companions", False)
        #: False for a store that no worker of 0.1.0 has used.
        self._is_shared: bool = getattr(store, "may_hold_earlier_records", True)
        #: The time of the mark, in monotonic milliseconds; None if unknown.
        self.marked: float | None = None
        #: The first message and its fingerprint, by register.
        self._arguments: dict[str, tuple[str, str]] = {}

    def mark(self) -> None:
        """Leave the mark, unless another worker has. Call this before the worker claims a key."""
        if not self._is_shared:
            return
        found: Entry = self.call_store(partial(self.store.get, _MARK))
        if found.value is None:
            is_empty = getattr(self.store, "is_empty", None)
            mark = _EMPTY if callable(is_empty) and self.call_store(is_empty) else _USED
            found = self.call_store(partial(self.store.swap, _MARK, None, mark, CENTURY_MS)) or Entry(mark, CENTURY_MS)
        self._saw(found)

    def completion(self, name: str, record: Record, retention: int) -> Completion:
        """Return the record of a completed key with its ttl, in a register that 0.1.0 names alike; then of its companion.

        0.1.0 refuses a record with a fingerprint of the arguments. Where 0.1.0 may read the register, also after a rollback, this
        process remembers the fingerprint. For other processes the register's companion, written in the same step, has the record
        with its fingerprint, unless the store can't write two registers in one step. The companion lives for an hour at most:
        duplicates come soon, and a store keeps millions of completed keys.

        Parameters:
          name: The register.
          record: The record of the run.
        """
        message_id, args = record.message_id, record.args
        if not self._is_shared:
            return records.completed_by(message_id, args), retention
        if len(self._arguments) >= _REMEMBERED:
            self._arguments.clear()
        self._arguments[name] = message_id, args
        completed = records.completed_by(message_id)
        if not self._takes_companions:
            return completed, retention
        return completed, retention, records.completed_by(message_id, args), min(retention, _COMPANION_TTL)

    def with_arguments(self, name: str, record: Record) -> Record:
        """Return a completed record with its fingerprint, if this process or the companion knows the fingerprint.

        Raises:
          StoreDown: The store is down.
        """
        if record.args or not self._is_shared:
            return record
        message_id, args = self._arguments.get(name, ("", ""))
        if message_id == record.message_id:
            return record._replace(args=args)
        if not self._takes_companions:
            return record
        store: Any = self.store
        found: Entry = self.call_store(partial(store.get_companion, name))
        known = None if found.value is None else Record.decode(found.value)
        return known if known is not None and known.message_id == record.message_id else record

    def find(self, name: str, retention: int) -> tuple[Record, int] | None:
        """Find the record that 0.1.0 wrote for a key, and for how many more milliseconds the store keeps the record.

        Parameters:
          name: The register of 0.1.0.
          retention: How long the store remembers a completed key, in milliseconds.

        Raises:
          StoreDown: The store is down.
          UnknownRecord: This version can't read the record in the register.
        """
        if not self._is_shared:
            return None
        if self.marked is None:
            self._saw(self.call_store(partial(self.store.get, _MARK)))
            if not self._is_shared:
                return None
        age = None if self.marked is None else clock.monotonic() * 1_000 - self.marked
        if age is not None and age > retention + _LATER:
            return None
        found: Entry = self.call_store(partial(self.store.get, name))
        if found.value is None:
            return None
        record = Record.decode(found.value)
        if record.state == records.COMPLETED:
            is_theirs = age is not None and retention - found.left > age
        else:
            is_theirs = record.beside is None
        return (record, found.left) if is_theirs else None

    def _saw(self, mark: Entry) -> None:
        if mark.left:
            self.marked = clock.monotonic() * 1_000 - (CENTURY_MS - mark.left)
        self._is_shared = mark.value != _EMPTY
