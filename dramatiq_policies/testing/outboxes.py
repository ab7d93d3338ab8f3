"""Committed messages of an outbox that a test's fault, or the death of a worker, has left unpublished."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from dramatiq.errors import BrokerConnectionError, ConnectionClosed

from ..brokers.batch import Encoded
from ..transactions.outbox import Outbox
from ..transactions.scope import WrittenRows

if TYPE_CHECKING:
    from ..transactions.database import Connection
    from ..transactions.publisher import Ticket

__all__ = ["AfterCommit", "Unpublished", "after_commits", "refusing"]

AfterCommit = Callable[["WrittenRows", "Connection | None"], "Ticket | None"]


class Unpublished(NamedTuple):
    """Unpublished rows of a commit.

    Attributes:
      connection: The connection that sees the rows; None for the outbox's connections.
    """

    outbox: Outbox
    written: WrittenRows
    connection: Connection | None = None

    def publish(self) -> bool:
        """Publish the rows, as a relay does later. Returns whether none is left."""
        outbox, ids = self.outbox, self.written.ids
        # A refused row belongs to nobody.
        owners = [self.written.owner, ""]
        run = outbox.run_over(self.connection)
        outbox.publication.publish_committed(run, ids, owners, monotonic())
        return not run(lambda connection: outbox.table.take(connection, ids, owners))


@contextmanager
def after_commits(outbox: Outbox, replace: Callable[[AfterCommit], AfterCommit]) -> Iterator[None]:
    """Call a replacement of `Outbox.after_commit` after each commit."""
    before = vars(outbox).get("after_commit")
    replacement = replace(outbox.after_commit)

    def after_commit(written: WrittenRows, connection: Connection | None = None) -> Ticket | None:
        return replacement(written, connection)

    outbox.after_commit = after_commit  # type: ignore[method-assign]
    try:
        yield
    finally:
        _restore(outbox, "after_commit", before)


@contextmanager
def refusing(
    outbox: Outbox, refusal: Callable[[], BaseException | None], unpublished: list[Unpublished]
) -> Iterator[None]:
    """Let the broker refuse messages of an outbox.

    Parameters:
      refusal: Returns the error for the next message; None to accept the message.
      unpublished: Gets the refused rows.
    """
    batch, refused = outbox.batch, [0]
    before, stock = vars(batch).get("publish"), batch.publish

    def publish(messages: Sequence[Encoded], meanwhile: Callable[[], object] | None = None) -> list[Exception | None]:
        found: list[Exception | None] = []
        for message in messages:
            error = refusal()
            refused[0] += error is not None
            if isinstance(error, BrokerConnectionError):
                error = ConnectionClosed(error)
            if error is not None and not isinstance(error, Exception):
                raise error
            found += stock([message]) if error is None else [error]
        return found

    def noting(after_commit: AfterCommit) -> AfterCommit:
        def call(written: WrittenRows, connection: Connection | None) -> Ticket | None:
            # `after_commit` takes the ids from ``written``.
            rows = Unpublished(outbox, copy(written), connection)
            count = refused[0]
            try:
                return after_commit(written, connection)
            finally:
                if refused[0] > count:
                    unpublished.append(rows)

        return call

    batch.publish = publish  # type: ignore[method-assign]
    try:
        with after_commits(outbox, noting):
            yield
    finally:
        _restore(batch, "publish", before)


def _restore(holder: object, name: str, before: object) -> None:
    """Undo the replacement of a method: of the class again, or of an outer fault."""
    if before is None:
        del vars(holder)[name]
    else:
        vars(holder)[name] = before
