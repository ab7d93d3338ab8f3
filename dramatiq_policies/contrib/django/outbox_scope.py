"""The transaction of an ``atomic`` block, as a scope of the outbox."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ...transactions.outbox import Outbox, Scope
from ...transactions.scope import WrittenRows
from .database import DjangoConnection, ThreadConnection

if TYPE_CHECKING:
    from ...transactions.outbox_table import NewRow

__all__ = ["AtomicScope", "publish"]

#: The attribute of Django's connection with the rows of its transaction.
_WRITTEN = "dramatiq_policies_written"


class AtomicScope(Scope):
    """The transaction of an ``atomic`` block.

    Parameters:
      connection: Django's connection.
    """

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def add(self, outbox: Outbox, row: NewRow) -> None:
        written = self.written(outbox)
        outbox.insert(DjangoConnection(self.connection), row, written)
        # At each send: Django drops the callbacks of a rolled-back savepoint. The first callback publishes all rows.
        self.connection.on_commit(partial(publish, outbox, written, self.connection.alias), robust=True)

    def written(self, outbox: Outbox) -> WrittenRows:
        """Return the rows of this transaction."""
        # One list of callbacks per transaction: Django makes a new list after the commit, and after each rollback.
        callbacks = self.connection.run_on_commit
        known = getattr(self.connection, _WRITTEN, None)
        if known is None or known[0] is not callbacks or known[1] is not outbox:
            known = (callbacks, outbox, WrittenRows())
            setattr(self.connection, _WRITTEN, known)
        found: WrittenRows = known[2]
        return found


def publish(outbox: Outbox, written: WrittenRows, using: str) -> None:
    """Publish committed rows, and wait for the publication as long as the outbox allows. Never raises."""
    outbox.wait_for(outbox.after_commit(written, ThreadConnection(using)))
