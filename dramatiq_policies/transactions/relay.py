"""Publish rows left by dead processes, or committed while the broker was unreachable."""

from __future__ import annotations

import threading
from time import monotonic
from typing import TYPE_CHECKING

from ..common.safe_logger import SafeLogger
from .database import is_missing_table
from .publication import LeasedRows, Publication
from .scope import WrittenRows

if TYPE_CHECKING:
    from .database import Database
    from .outbox_table import Row

__all__ = ["Relay"]

logger = SafeLogger("dramatiq_policies.outbox")
alerts = SafeLogger("dramatiq_policies.alerts")

#: Seconds between two polls, and the longest pause while the database or the broker is unreachable.
POLL = 1.0
_LONGEST_PAUSE = 5.0
#: How many rows to take: at first, at least and at most. As many as have these bytes in all, by the batch before.
_FIRST, _LEAST, _MOST = 100, 10, 1_000
_BYTES = 4_000_000


class Relay:
    """Takes and publishes due rows, a batch at a time. Any number of relays share the rows.

    Parameters:
      database: The library's own connections.
      publication: Publishes rows.
      how_to_create: The advice for a missing table, for the log.
    """

    def __init__(self, database: Database, publication: Publication, how_to_create: str) -> None:
        self._database = database
        self._publication = publication
        self._how_to_create = how_to_create
        self._logged_missing_table = False
        self._failures = 0
        #: Whether the broker was unreachable at the last failure.
        self._broker_failed = False
        self._limit = _FIRST
        #: Rows taken before the batch before was confirmed.
        self._ahead: LeasedRows | None = None
        # Older versions of SQLite take 999 parameters.
        self._most = 500 if database.dialect == "sqlite" else _MOST

    def run(self, stop: threading.Event) -> None:
        """Publish until ``stop`` is set; finish the present batch."""
        try:
            while self._ahead is not None or not stop.is_set():
                stop.wait(self._step(ahead=not stop.is_set()))
        finally:
            self._publication.batch.close()

    def _step(self, *, ahead: bool = False) -> float:
        """Publish one batch. Returns the seconds to pause."""
        try:
            taken, lost = self.relay(ahead=ahead)
        except Exception as error:
            self._broker_failed = False
            return self._failed(error)
        if lost is not None:
            self._broker_failed = True
            return self._failed(lost)
        # While no row is due, the broker may still be unreachable.
        if self._failures and (taken or not self._broker_failed):
            self._failures = 0
            logger.info("The relay of the outbox works again.")
        if not taken:
            self._publication.batch.serve()
        return 0 if taken >= _LEAST else POLL

    def relay(self, *, ahead: bool = False) -> tuple[int, Exception | None]:
        """Publish one batch. Returns the number of taken rows, and the error of an unreachable broker.

        With ``ahead``, also take the next batch, while the broker works on a full one.

        Raises:
          Exception: The error of the database.
        """
        limit = self._limit
        lease, self._ahead = self._ahead or self._take(limit), None
        rows = lease.rows
        if not rows:
            return 0, None
        size = sum(len(row.body) for row in rows) / len(rows)
        self._limit = max(_LEAST, min(self._most, int(_BYTES / max(1, size))))
        meanwhile = self._take_ahead if ahead and len(rows) >= limit else None
        return len(rows), self._publication.publish(self._database.run, lease, meanwhile)

    def _take_ahead(self) -> None:
        try:
            lease = self._take(self._limit)
        except Exception:
            return  # The next step raises the error.
        self._ahead = lease if lease.rows else None

    def _take(self, limit: int) -> LeasedRows:
        database, table = self._database, self._publication.table
        since, owner = monotonic(), WrittenRows().owner
        rows: list[Row]
        if database.dialect == "postgresql":
            rows = database.run(lambda connection: table.take_due(connection, owner, limit))
        elif database.run(table.has_due):
            rows = database.transaction(lambda connection: table.take_due(connection, owner, limit))
        else:
            rows = []
        return LeasedRows(rows, [owner], since)

    def _failed(self, error: Exception) -> float:
        self._failures += 1
        if is_missing_table(error):
            if not self._logged_missing_table:
                self._logged_missing_table = True
                alerts.error(
                    "The outbox has no table: %s. The relay publishes nothing until then.", self._how_to_create
                )
        elif self._failures == 1:
            logger.warning(
                "The relay of the outbox can't publish (%s: %s). The relay tries again.", type(error).__name__, error
            )
        return min(_LONGEST_PAUSE, POLL * 2.0 ** min(self._failures - 1, 3))
