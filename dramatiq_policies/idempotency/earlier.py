"""Records that 0.1.0 wrote under another name: honoured for as long as they last.

0.1.0 named a register by the text of its key. Where the name is another one now (see `keys`), two jobs may have had that
one register, and one of the two still has it. So a record found there counts only if it is 0.1.0's: a claim says so itself,
a completion does not, and counts if it is older than the mark that the first worker of a newer version leaves in the store.
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

__all__ = ["EarlierRecords"]

#: The register of the mark. It holds nothing of interest; its age is what is gone of its ttl.
_MARK = typed_name(("#", "version 2"))
#: For how long, in milliseconds, records of 0.1.0 may outlast their ttl: they wait for a retry, and are written while old
#: workers are still deployed.
_LATER = 2 * WEEK_MS


class EarlierRecords:
    """What 0.1.0 left in one store.

    Parameters:
      store, ask: Where, and what calls it.
    """

    def __init__(self, store: IdempotencyStore, ask: Callable[[Callable[[], Any]], Any]) -> None:
        self.store = store
        self.ask = ask
        #: When the mark was left, in monotonic milliseconds; None where that is not known.
        self.marked: float | None = None

    def mark(self) -> None:
        """Leave the mark, unless another worker has."""
        found: Entry | None = self.ask(partial(self.store.swap, _MARK, None, b"2", CENTURY_MS))
        self._saw(CENTURY_MS if found is None else found.left)

    def find(self, name: str, keep: int) -> tuple[Record, int] | None:
        """What 0.1.0 knew of a key, and for how many more milliseconds that is kept.

        Parameters:
          name: The register of 0.1.0.
          keep: How long a completed key is remembered, in milliseconds.

        Raises:
          StoreDown: The store could not be asked.
          UnknownRecord: The register holds something that this version can't read.
        """
        if self.marked is None:
            self._saw(self.ask(partial(self.store.get, _MARK)).left)
        age = None if self.marked is None else clock.monotonic() * 1_000 - self.marked
        if age is not None and age > keep + _LATER:
            return None
        found: Entry = self.ask(partial(self.store.get, name))
        if found.value is None:
            return None
        record = Record.decode(found.value)
        if record.state == records.COMPLETED:
            is_theirs = age is not None and keep - found.left > age
        else:
            is_theirs = record.beside is None
        return (record, found.left) if is_theirs else None

    def _saw(self, left: int) -> None:
        if left:
            self.marked = clock.monotonic() * 1_000 - (CENTURY_MS - left)
