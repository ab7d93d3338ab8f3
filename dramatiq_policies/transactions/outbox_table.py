"""The rows of the outbox, as processes insert, lease and delete them: committed messages, not yet published.

A relay may take a row after ``due_at``: the end of a lease and the time of the next try are one column. Each method
takes the connection of its caller. Each write names the owner of the lease, because the row of a process that
stood still for longer than the lease belongs to another process, and because SQLite may reuse the id of a deleted row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .database import NOW, OUTBOX, Connection, for_update_skip_locked, list_params

__all__ = ["MEMBER", "MESSAGE", "NewRow", "OutboxTable", "Row"]

#: The kinds of rows: publish this message; count this member of a group, and publish the callbacks.
MESSAGE, MEMBER = "message", "member"

_TEXT = 255
_ERROR = 1_000


class NewRow(NamedTuple):
    """A row to insert. ``body`` is the encoded final message, ``delay`` the delay asked for in milliseconds."""

    kind: str
    message_id: str
    actor: str
    queue: str
    body: bytes
    delay: int | None = None


class Row(NamedTuple):
    """A row leased by this process."""

    id: int
    kind: str
    message_id: str
    actor: str
    queue: str
    body: bytes
    delay: int | None
    failures: int


_COLUMNS = "id, kind, message_id, actor, queue, body, delay, failures"


class OutboxTable:
    """The rows of one namespace.

    Parameters:
      namespace: The namespace, at most 64 characters.
      lease: The lease of a taken row, in milliseconds.
      dialect: The database's dialect.
    """

    def __init__(self, namespace: str, lease: int, dialect: str) -> None:
        self.namespace = namespace
        self.lease = lease
        self._dialect = dialect
        self._now = NOW[dialect]
        #: The locking clause of a SELECT; None until the version of the server is known.
        self._locking: str | None = None

    # The sender's side.

    def insert(self, connection: Connection, row: NewRow, owner: str, *, due: bool = False) -> int:
        """Insert a row, leased to ``owner``, or due at once with ``due``. Returns the id."""
        returning = " RETURNING id" if self._dialect == "postgresql" else ""
        found = connection.execute(
            f"INSERT INTO {OUTBOX} (namespace, kind, message_id, actor, queue, body, delay, created_at, due_at, owner,"  # noqa: S608
            f" failures, error) VALUES (:namespace, :kind, :message_id, :actor, :queue, :body, :delay, {self._now},"
            f" {self._now} + :lease, :owner, 0, ''){returning}",
            namespace=self.namespace,
            kind=row.kind,
            message_id=row.message_id[:_TEXT],
            actor=row.actor[:_TEXT],
            queue=row.queue[:_TEXT],
            body=row.body,
            delay=row.delay,
            lease=0 if due else self.lease,
            owner="" if due else owner,
        )
        if found.last_id:
            return found.last_id
        if not returning:
            # Not every driver reports the id.
            function = "last_insert_rowid()" if self._dialect == "sqlite" else "LAST_INSERT_ID()"
            found = connection.execute(f"SELECT {function}")
        return int(found.rows[0][0])

    # The publisher's side.

    def take(self, connection: Connection, ids: Sequence[int], owners: Sequence[str]) -> list[Row]:
        """Return the committed rows with these ids and owners."""
        where, params = _owned(ids, owners)
        found = connection.execute(f"SELECT {_COLUMNS} FROM {OUTBOX} WHERE {where} ORDER BY id", **params)  # noqa: S608
        return [_row(one) for one in found.rows]

    def renew(self, connection: Connection, ids: Sequence[int], owners: Sequence[str]) -> None:
        """Renew the leases of the rows with these ids and owners."""
        where, params = _owned(ids, owners)
        due = f"{self._now} + :lease"
        connection.execute(f"UPDATE {OUTBOX} SET due_at = {due} WHERE {where}", lease=self.lease, **params)  # noqa: S608

    def take_due(self, connection: Connection, owner: str, limit: int) -> list[Row]:
        """Lease due rows, at most ``limit``, the longest due first. Call this method in a separate transaction.

        On PostgreSQL one statement does all, and may commit by itself.
        """
        due = f"namespace = :namespace AND due_at <= {self._now} ORDER BY due_at, id LIMIT :limit"
        if self._dialect == "postgresql":
            found = connection.execute(
                f"WITH due AS (SELECT id FROM {OUTBOX} WHERE {due} FOR UPDATE SKIP LOCKED) "  # noqa: S608
                f"UPDATE {OUTBOX} AS taken SET owner = :owner, due_at = {self._now} + :lease FROM due WHERE taken.id = due.id "
                f"RETURNING {', '.join(f'taken.{name}' for name in _COLUMNS.split(', '))}",
                namespace=self.namespace,
                limit=limit,
                owner=owner,
                lease=self.lease,
            )
            return sorted(_row(one) for one in found.rows)
        if self._locking is None:
            locking = for_update_skip_locked(connection)
            # No lock without SKIP LOCKED: a lock would wait for transactions of the application.
            self._locking = locking if "SKIP LOCKED" in locking else ""
        found = connection.execute(
            f"SELECT {_COLUMNS} FROM {OUTBOX} WHERE {due}{self._locking}",  # noqa: S608
            namespace=self.namespace,
            limit=limit,
        )
        rows = sorted(_row(one) for one in found.rows)
        if not rows:
            return []
        named, params = list_params("id", [row.id for row in rows])
        taken = connection.execute(
            f"UPDATE {OUTBOX} SET owner = :owner, due_at = {self._now} + :lease"  # noqa: S608
            f" WHERE id IN ({named}) AND due_at <= {self._now}",
            owner=owner,
            lease=self.lease,
            **params,
        )
        if taken.rowcount == len(rows):
            return rows
        # Another process may have taken some of the rows.
        return self.take(connection, [row.id for row in rows], [owner])

    def has_due(self, connection: Connection) -> bool:
        """Return whether any row is due, without a lock."""
        found = connection.execute(
            f"SELECT 1 FROM {OUTBOX} WHERE namespace = :namespace AND due_at <= {self._now} LIMIT 1",  # noqa: S608
            namespace=self.namespace,
        )
        return bool(found.rows)

    def delete(self, connection: Connection, ids: Sequence[int], owners: Sequence[str]) -> None:
        """Delete published rows."""
        where, params = _owned(ids, owners)
        connection.execute(f"DELETE FROM {OUTBOX} WHERE {where}", **params)  # noqa: S608

    def fail(
        self,
        connection: Connection,
        ids: Sequence[int],
        owners: Sequence[str],
        wait: int,
        error: str,
        body: bytes | None = None,
    ) -> None:
        """Release rows for another try after ``wait`` milliseconds, with a new body if one is given."""
        where, params = _owned(ids, owners)
        if body is not None:
            params["body"] = body
        connection.execute(
            f"UPDATE {OUTBOX} SET failures = failures + 1, error = :error, owner = '', due_at = {self._now} + :wait"  # noqa: S608
            f"{'' if body is None else ', body = :body'} WHERE {where}",
            error=error.replace("\0", "")[:_ERROR],
            wait=wait,
            **params,
        )


def _owned(ids: Sequence[int], owners: Sequence[str]) -> tuple[str, dict[str, Any]]:
    named_ids, params = list_params("id", ids)
    named_owners, more = list_params("owner", owners)
    return f"id IN ({named_ids}) AND owner IN ({named_owners})", {**params, **more}


def _row(values: Sequence[Any]) -> Row:
    id_, kind, message_id, actor, queue, body, delay, failures = values
    return Row(int(id_), kind, message_id, actor, queue, bytes(body), delay, int(failures))
