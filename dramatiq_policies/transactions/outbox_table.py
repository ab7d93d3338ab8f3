"""The rows of the outbox: committed messages, not yet published.

A relay may take a row after ``due_at``: the end of a lease and the time of the next try are one column. Each method
takes the connection of its caller. Each write names the owner of the lease, because the row of a process that
stood still for longer than the lease belongs to another process, and because SQLite may reuse the id of a deleted row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .database import NOW, OUTBOX, Connection, for_update_skip_locked, list_params

__all__ = ["MEMBER", "MESSAGE", "NewRow", "OutboxGroup", "OutboxRow", "OutboxStats", "OutboxTable", "Row", "Selection"]

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


class OutboxRow(NamedTuple):
    """A row to show. ``due_in_ms`` is negative for an overdue row; ``is_leased`` is True while a process publishes the row."""

    id: int
    kind: str
    message_id: str
    actor: str
    queue: str
    age_ms: int
    failures: int
    error: str
    due_in_ms: int
    is_leased: bool


class OutboxGroup(NamedTuple):
    """The number of waiting rows of an actor in a queue."""

    actor: str
    queue: str
    messages: int


class OutboxStats(NamedTuple):
    """The number of waiting rows, the age of the oldest in milliseconds (0 without rows), and the number of failed rows."""

    pending: int
    oldest_ms: int
    failing: int


class Selection(NamedTuple):
    """A filter of rows: a row must fit every given part. Without parts, all rows of the namespace."""

    message_ids: Sequence[str] = ()
    actor: str | None = None
    queue: str | None = None


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

    # The operator's side.

    def ids_with_prefix(self, connection: Connection, prefix: str, limit: int) -> list[str]:
        """Return message ids that begin with a text, at most ``limit``."""
        pattern = "".join(f"!{one}" if one in "!%_" else one for one in prefix) + "%"
        found = connection.execute(
            f"SELECT DISTINCT message_id FROM {OUTBOX} WHERE namespace = :namespace"  # noqa: S608
            " AND message_id LIKE :pattern ESCAPE '!' ORDER BY message_id LIMIT :limit",
            namespace=self.namespace,
            pattern=pattern,
            limit=limit,
        )
        return [message_id for (message_id,) in found.rows]

    def count(self, connection: Connection, selection: Selection | None = None) -> list[OutboxGroup]:
        """Count rows by actor and queue, the most frequent first."""
        where, params = self._selected(selection)
        found = connection.execute(
            f"SELECT actor, queue, COUNT(*) FROM {OUTBOX} WHERE {where} GROUP BY actor, queue"  # noqa: S608
            " ORDER BY COUNT(*) DESC, actor, queue",
            **params,
        )
        return [OutboxGroup(actor, queue, int(count)) for actor, queue, count in found.rows]

    def list(self, connection: Connection, selection: Selection | None = None, limit: int = 100) -> list[OutboxRow]:
        """Return rows, the oldest first."""
        where, params = self._selected(selection)
        found = connection.execute(
            f"SELECT id, kind, message_id, actor, queue, {self._now} - created_at, failures, error, due_at - {self._now}, owner"  # noqa: S608
            f" FROM {OUTBOX} WHERE {where} ORDER BY id LIMIT :limit",
            limit=limit,
            **params,
        )
        return [
            OutboxRow(
                int(id_),
                kind,
                message_id,
                actor,
                queue,
                max(0, int(age)),
                failures,
                error,
                int(due),
                bool(owner) and due > 0,
            )
            for id_, kind, message_id, actor, queue, age, failures, error, due, owner in found.rows
        ]

    def retry(self, connection: Connection, selection: Selection | None = None) -> int:
        """Make rows due, except rows in publication. Returns the number of changed rows."""
        where, params = self._selected(selection)
        return connection.execute(
            f"UPDATE {OUTBOX} SET due_at = {self._now} WHERE {where} AND owner = ''",  # noqa: S608
            **params,
        ).rowcount

    def purge(self, connection: Connection, selection: Selection | None = None) -> int:
        """Delete rows; the messages are never published. Returns the number of deleted rows."""
        where, params = self._selected(selection)
        return connection.execute(f"DELETE FROM {OUTBOX} WHERE {where}", **params).rowcount  # noqa: S608

    def stats(self, connection: Connection) -> OutboxStats:
        """Count the rows."""
        found = connection.execute(
            f"SELECT COUNT(*), COALESCE({self._now} - MIN(created_at), 0),"  # noqa: S608
            f" COALESCE(SUM(CASE WHEN failures > 0 THEN 1 ELSE 0 END), 0) FROM {OUTBOX} WHERE namespace = :namespace",
            namespace=self.namespace,
        )
        ((pending, oldest, failing),) = found.rows
        return OutboxStats(int(pending), max(0, int(oldest)), int(failing))

    def _selected(self, selection: Selection | None) -> tuple[str, dict[str, Any]]:
        message_ids, actor, queue = selection or Selection()
        parts, params = ["namespace = :namespace"], {"namespace": self.namespace}
        if message_ids:
            named, ids = list_params("message_id", message_ids)
            parts.append(f"message_id IN ({named})")
            params.update(ids)
        for name, value in (("actor", actor), ("queue", queue)):
            if value is not None:
                parts.append(f"{name} = :{name}")
                params[name] = value
        return " AND ".join(parts), params


def _owned(ids: Sequence[int], owners: Sequence[str]) -> tuple[str, dict[str, Any]]:
    named_ids, params = list_params("id", ids)
    named_owners, more = list_params("owner", owners)
    return f"id IN ({named_ids}) AND owner IN ({named_owners})", {**params, **more}


def _row(values: Sequence[Any]) -> Row:
    id_, kind, message_id, actor, queue, body, delay, failures = values
    return Row(int(id_), kind, message_id, actor, queue, bytes(body), delay, int(failures))
