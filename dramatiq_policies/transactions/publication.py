"""Publish and delete leased rows: shared by the committing process and the relay.

Nothing holds a transaction while messages are published. The steps are: renew the lease if half has passed, publish,
delete. If a process dies or stands still before the delete, another process publishes the rows once more, with the same
message ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from dramatiq.errors import ConnectionClosed

from ..brokers.batch import Batch, Encoded
from ..common import clock
from ..common.safe_logger import SafeLogger
from ..common.throttle import Throttle
from ..outcomes import text_of
from .members import messages_of, without

if TYPE_CHECKING:
    from .database import Connection
    from .outbox_table import OutboxTable, Row

__all__ = ["LeasedRows", "Publication", "RunWork"]

logger = SafeLogger("dramatiq_policies.outbox")
alerts = SafeLogger("dramatiq_policies.alerts")

#: The longest wait of a failed row in milliseconds, and the longest wait while the broker is unreachable.
_LONGEST_WAIT, _LONGEST_OUTAGE_WAIT = 60_000, 5_000
#: The number of failures that raises an alert.
_ALERT_AT = 10
#: Milliseconds between two alerts of an unreachable broker.
_ALERT_EVERY = 300_000


#: Calls work with a connection: `Database.run`, or a connection of the caller's.
RunWork = Callable[[Callable[["Connection"], Any]], Any]


class LeasedRows(NamedTuple):
    """Rows leased by this process: the owners, and the start of the lease in monotonic seconds."""

    rows: Sequence[Row]
    owners: Sequence[str]
    since: float


class _Refused(NamedTuple):
    """A refused row, and the positions of its accepted messages: a row of a group may have several callbacks."""

    row: Row
    error: Exception
    accepted: list[int]


class _Result(NamedTuple):
    published: list[Row]
    refused: list[_Refused]
    #: Not tried, or not confirmed: the broker is unreachable.
    lost: list[Row]
    error: Exception | None


class Publication:
    """Publishes rows of one outbox."""

    def __init__(self, table: OutboxTable, batch: Batch) -> None:
        self.table = table
        self.batch = batch
        self._outage_alerts = Throttle()

    def publish_committed(
        self, run: RunWork, ids: Sequence[int], owners: Sequence[str], since: float
    ) -> Exception | None:
        """Publish the committed rows with these ids and owners, leased since ``since``: see `publish`."""
        rows = run(lambda connection: self.table.take(connection, ids, owners))
        return self.publish(run, LeasedRows(rows, owners, since)) if rows else None

    def publish(
        self, run: RunWork, lease: LeasedRows, meanwhile: Callable[[], object] | None = None
    ) -> Exception | None:
        """Publish and delete rows. Returns the error of an unreachable broker, or None.

        If the broker confirms messages with a delay, this calls ``meanwhile``, which never raises, before the confirms.

        Raises:
          Exception: The error of the database. A relay tries the rows again after the lease.
        """
        table = self.table
        if (monotonic() - lease.since) * 1_000 > table.lease / 2:
            ids = [row.id for row in lease.rows]
            began = monotonic()
            run(lambda connection: table.renew(connection, ids, lease.owners))
            lease = LeasedRows(run(lambda connection: table.take(connection, ids, lease.owners)), lease.owners, began)
        result = _publish(self.batch, lease.rows, meanwhile if self.batch.overlaps else None)
        if result.published:
            self._delete(run, lease, [row.id for row in result.published])
        for row, error, accepted in result.refused:
            rest = without(row, accepted) if accepted else None
            text = self._fail(run, lease, [row], error, _LONGEST_WAIT, rest)
            self._report(row, text)
        # The fewest failures first: rows with equal failures are together.
        by_failures = sorted(result.lost, key=_failures_of)
        for failures, rows in groupby(by_failures, key=_failures_of):
            assert result.error is not None
            text = self._fail(run, lease, list(rows), result.error, _LONGEST_OUTAGE_WAIT)
            if failures + 1 >= _ALERT_AT and self._outage_alerts.admits("broker", _ALERT_EVERY):
                alerts.critical(
                    "The broker is unreachable (%s): committed messages wait in the outbox. No message is lost.", text
                )
        return result.error

    def _delete(self, run: RunWork, lease: LeasedRows, ids: list[int]) -> None:
        """Delete published rows. Tries until the lease ends: a remaining row would be published again."""
        pause = 0.05
        while True:
            try:
                run(lambda connection: self.table.delete(connection, ids, lease.owners))
            except Exception as error:
                if (monotonic() - lease.since + pause) * 1_000 > self.table.lease:
                    logger.error(  # noqa: TRY400 - the stack of a driver helps nobody
                        "%d published messages could not be deleted from the outbox, and will be published again: %s",
                        len(ids),
                        error,
                    )
                    raise
            else:
                return
            clock.sleep(pause)
            pause = min(pause * 2, 2.0)

    def _fail(
        self,
        run: RunWork,
        lease: LeasedRows,
        rows: Sequence[Row],
        error: Exception,
        longest: int,
        body: bytes | None = None,
    ) -> str:
        text = f"{type(error).__name__}: {text_of(error)}"
        wait = min(longest, 1_000 * 2 ** min(rows[0].failures, 6))
        ids = [row.id for row in rows]
        run(lambda connection: self.table.fail(connection, ids, lease.owners, wait, text, body))
        return text

    @staticmethod
    def _report(row: Row, text: str) -> None:
        fields = {"actor": row.actor, "queue": row.queue, "message_id": row.message_id}
        values = (row.message_id, row.actor, row.queue, row.failures + 1, text)
        line = "The outbox could not publish message %s of actor %r to queue %r, try %d (%s)."
        if row.failures + 1 == _ALERT_AT:
            alerts.critical(
                f"{line} The relay tries again every minute; see `dramatiq-policies outbox list`.",
                *values,
                extra=fields,
            )
        else:
            logger.warning(line, *values, extra=fields)


def _failures_of(row: Row) -> int:
    return row.failures


def _publish(batch: Batch, rows: Sequence[Row], meanwhile: Callable[[], object] | None) -> _Result:
    result = _Result([], [], [], None)
    # A failed row goes alone: on RabbitMQ a refused message closes the channel, for other messages too.
    groups = [[row for row in rows if not row.failures], *([row] for row in rows if row.failures)]
    for group in filter(None, groups):
        if result.error is not None:
            result.lost.extend(group)
            continue
        outcome = _publish_group(batch, group, meanwhile)
        meanwhile = None
        result.published.extend(outcome.published)
        result.refused.extend(outcome.refused)
        result.lost.extend(outcome.lost)
        result = result._replace(error=outcome.error)
    return result


def _publish_group(batch: Batch, rows: Sequence[Row], meanwhile: Callable[[], object] | None) -> _Result:
    result = _Result([], [], [], None)
    messages: list[Encoded] = []
    #: For each row the number of its messages, or the error.
    sizes: list[int | Exception] = []
    for row in rows:
        try:
            found = messages_of(row, batch)
        except Exception as error:
            sizes.append(error)
        else:
            messages += found
            sizes.append(len(found))
    more = () if meanwhile is None else (meanwhile,)
    answers = iter(batch.publish(messages, *more) if messages else [])
    sent = iter(messages)
    lost: Exception | None = None
    for row, size in zip(rows, sizes, strict=True):
        if isinstance(size, Exception):
            result.refused.append(_Refused(row, size, []))
            continue
        refusal: Exception | None = None
        accepted: list[int] = []
        for position in range(size):
            message, answer = next(sent), next(answers)
            if answer is None:
                accepted.append(position)
                batch.emit_after_enqueue(message.message, row.delay)
            refusal = refusal or answer
        if refusal is None:
            result.published.append(row)
        elif isinstance(refusal, ConnectionClosed):
            lost = refusal
            result.lost.append(row)
        else:
            result.refused.append(_Refused(row, refusal, accepted))
    return result._replace(error=lost)
