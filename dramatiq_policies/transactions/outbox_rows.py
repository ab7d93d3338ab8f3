"""The waiting rows of the outbox, as operators see and change them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .database import NOW, OUTBOX, Connection, list_params

__all__ = ["OutboxGroup", "OutboxRow", "OutboxRows", "OutboxStats", "Selection"]


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


class OutboxRows:
    """The waiting rows of one namespace. Each method takes the connection of its caller.

    Parameters:
      namespace: The namespace.
      dialect: The database's dialect.
    """

    def __init__(self, namespace: str, dialect: str) -> None:
        self.namespace = namespace
        self._now = NOW[dialect]

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
