"""The thread that publishes this process's committed messages.

With a separate thread, a frozen broker delays the caller of a commit for a bounded time only. Messages of simultaneous
transactions are published together. Interrupts of jobs may strike in `Publisher.submit` and `Ticket.wait`: both use only
calls that are safe to abandon.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING

from ..common.forks import after_fork
from ..common.safe_logger import SafeLogger
from .publication import Publication
from .scope import WrittenRows

if TYPE_CHECKING:
    from .database import Database

__all__ = ["Publisher", "Ticket"]

logger = SafeLogger("dramatiq_policies.outbox")

#: Commits to publish together, and rows at a time.
_COMMITS_AT_ONCE = 100
_ROWS_AT_ONCE = 500
#: Seconds without work until the thread ends.
_IDLE = 30.0
#: The most waiting rows. A relay publishes the others after their lease: the broker is frozen, or slow.
_MOST_WAITING = 10_000


class Ticket:
    """Rows on their way to the broker."""

    __slots__ = ("_callbacks", "_latch", "is_done", "written")

    def __init__(self, written: WrittenRows) -> None:
        self.written = written
        self.is_done = False
        self._callbacks: list[Callable[[], object]] = []
        # A lock, not an Event: an interrupt in `Event.wait` may leave the Event locked.
        self._latch = threading.Lock()
        self._latch.acquire()

    def wait(self, seconds: float) -> None:
        """Wait until the rows are published, or have failed."""
        if self._latch.acquire(timeout=seconds):
            self._latch.release()

    def call_when_done(self, callback: Callable[[], object]) -> None:
        """Call ``callback`` on another thread after the publication, or here if the rows are published. Rarely both."""
        self._callbacks.append(callback)
        if self.is_done:
            callback()

    def done(self) -> None:
        self.is_done = True
        self._latch.release()
        for callback in list(self._callbacks):
            try:
                callback()
            except Exception:
                logger.exception("Reporting a publication to the committing thread raised an error.")


class Publisher:
    """Publishes committed rows of this process on a thread, which the first commit starts.

    Parameters:
      database: The library's own connections.
      publication: Publishes rows.
      patience: The longest wait of a caller, in seconds.
    """

    def __init__(self, database: Database, publication: Publication, patience: float) -> None:
        self._database = database
        self._publication = publication
        self._patience = patience
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        self._queue: SimpleQueue[Ticket] = SimpleQueue()
        self._thread: threading.Thread | None = None
        #: The start of the present batch; None while the thread is idle.
        self._busy_since: float | None = None
        self._failing = False

    def submit(self, written: WrittenRows) -> Ticket:
        """Queue committed rows for publication."""
        ticket = Ticket(written)
        if self._queue.qsize() > _MOST_WAITING:
            ticket.done()
            return ticket
        self._queue.put(ticket)
        # After the put: an ending thread checks the queue once more. Two threads do no harm.
        if self._thread is None:
            thread = threading.Thread(target=self._serve, name="dramatiq-policies-outbox-publisher", daemon=True)
            # First: an interrupt of a job must not leave a thread behind that never starts.
            thread.start()
            self._thread = thread
        return ticket

    def is_stuck(self) -> bool:
        """Return whether a wait is useless, because the broker or the database has not answered for a while."""
        since = self._busy_since
        return since is not None and monotonic() - since > self._patience

    def _serve(self) -> None:
        me = threading.current_thread()
        try:
            while True:
                try:
                    first = self._queue.get(timeout=_IDLE)
                except Empty:
                    self._thread = None
                    if self._queue.empty():
                        return
                    self._thread = me
                    continue
                self._publish([first, *self._waiting_tickets()])
        finally:
            self._publication.batch.close()

    def _waiting_tickets(self) -> list[Ticket]:
        """Take the tickets that wait, to publish their rows together."""
        more: list[Ticket] = []
        while len(more) < _COMMITS_AT_ONCE - 1:
            try:
                more.append(self._queue.get_nowait())
            except Empty:
                break
        return more

    def _publish(self, tickets: list[Ticket]) -> None:
        self._busy_since = monotonic()
        try:
            self._publish_rows([ticket.written for ticket in tickets])
        except Exception as error:
            # The rows are in the database, and the relay publishes them.
            if not self._failing:
                self._failing = True
                logger.warning("Committed messages could not be published at once (%s). A relay publishes them.", error)
        else:
            self._failing = False
        finally:
            self._busy_since = None
            for ticket in tickets:
                ticket.done()

    def _publish_rows(self, written: list[WrittenRows]) -> None:
        ids = [row_id for one in written for row_id in one.ids]
        owners = [one.owner for one in written]
        since = min(one.since for one in written if one.since is not None)
        for start in range(0, len(ids), _ROWS_AT_ONCE):
            batch = ids[start : start + _ROWS_AT_ONCE]
            lost = self._publication.publish_committed(self._database.run, batch, owners, since)
            if lost is not None:
                logger.info("The broker is unreachable; committed messages wait in the outbox: %s", lost)
                return
