"""The session of a transactional job: refuses the job's own commits, and knows the connections of the session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Engine, ExceptionContext
from sqlalchemy.orm import Session

from ..common.safe_logger import SafeLogger
from ..errors import ConfigurationError
from ..transactions.database import has_rolled_back
from .connection import dialect_of, is_in_memory, isolation_level_of

if TYPE_CHECKING:
    from ..transactions.outbox import Scope
    from ..transactions.scope import EnteredScope

__all__ = ["CommitGuard", "JobSession", "listen_to_connections"]

logger = SafeLogger("dramatiq_policies.outcomes")

#: The key of the guard in a session's and a connection's ``info``.
_KEY = "dramatiq_policies_guard"
_COMMITTED = (
    "A job with transactional=True must not commit: the worker commits after the job has returned, together with the completion "
    "of its key and with its messages. Remove the commit, or use session.begin_nested() for a savepoint."
)
_CLOSED = (
    "A job with transactional=True must not close its session, because that rolls back its effect: the worker commits and closes "
    "after the job has returned. Remove close() or the with block. To give up the effect, call session.rollback() first."
)


class CommitGuard:
    """Refuses the job's own commits of a session, and knows the session's connections.

    Attributes:
      is_open: Whether commits are allowed: the job has returned.
      refused: Why the worker must not commit: the job has tried to commit or to close, or the server has rolled the transaction
        back.
    """

    def __init__(self, session: Session) -> None:
        self.is_open = False
        self.refused: Exception | None = None
        self._block: EnteredScope[Scope] | None = None
        self._connections: list[sa.Connection] = []
        session.info[_KEY] = self

    def add(self, connection: sa.Connection) -> None:
        """Guard a connection with a new transaction or savepoint of the session."""
        if connection not in self._connections:
            self._connections.append(connection)
            if not isinstance(self.refused, ConfigurationError):
                # The job has ended the transaction that the server had rolled back.
                self.refused = None
            vars(connection)[_KEY] = self
            _isolate(connection)

    def open(self, block: EnteredScope[Scope]) -> None:
        """Allow the commit.

        Parameters:
          block: Left before the COMMIT: listeners send their messages after it at once.
        """
        self.is_open = True
        self._block = block

    def before_commit(self) -> None:
        """The connection is about to send the COMMIT.

        Raises:
          ConfigurationError: The job has not returned.
        """
        self.check_commit()
        if self._block is not None:
            self._block.leave()

    def check_commit(self) -> None:
        """Refuse a commit before the job has returned.

        Raises:
          ConfigurationError: The job has not returned.
        """
        if not self.is_open:
            self.refused = refused = ConfigurationError(_COMMITTED)
            raise refused

    def note_close(self) -> None:
        """Let a run fail at its end, not in a ``with`` block of the job, whose own error counts."""
        if not self.is_open and self.refused is None:
            self.refused = ConfigurationError(_CLOSED)

    @property
    def is_unsure(self) -> bool:
        """Whether a COMMIT has failed: SQLAlchemy then sends no ROLLBACK, and the pool would keep the open transaction."""
        return self.is_open or self.refused is not None

    def raise_refused(self) -> None:
        """Raise the error after which the worker must not commit, in case the job has caught the error."""
        if self.refused is not None:
            raise self.refused

    def invalidate(self) -> None:
        """Close the connections; the pool makes new ones. Never raises. A database in memory ends with its connection: roll back."""
        for connection in self._connections:
            try:
                if connection.closed:
                    continue
                if is_in_memory(connection.engine):
                    connection.connection.rollback()
                else:
                    connection.invalidate()
            except Exception:
                logger.exception("A connection that an interrupt may have broken did not close cleanly.")


def listen_to_connections(engine: Engine) -> None:
    """Guard the connections of an engine that only transactional jobs use."""
    event.listen(engine, "commit", _before_connection_commit)
    # Of all connections of the dialect.
    event.listen(engine, "handle_error", _after_error)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "before_cursor_execute", _begin_on_sqlite)


class JobSession(Session):
    """The session of a transactional job. The class has the listeners: listeners per session would take longer."""

    def close(self) -> None:
        if self.in_transaction():
            _guard_of(self).note_close()
        super().close()


@event.listens_for(JobSession, "after_begin")
def _after_begin(session: Session, _transaction: object, connection: sa.Connection) -> None:
    _guard_of(session).add(connection)


@event.listens_for(JobSession, "before_commit")
def _before_commit(session: Session) -> None:
    # Also called at the release of a savepoint.
    if not session.in_nested_transaction():
        _guard_of(session).check_commit()


def _before_connection_commit(connection: sa.Connection) -> None:
    guard: CommitGuard | None = vars(connection).get(_KEY)
    if guard is not None:
        guard.before_commit()


def _after_error(context: ExceptionContext) -> None:
    guard: CommitGuard | None = vars(context.connection).get(_KEY) if context.connection is not None else None
    if guard is not None and has_rolled_back(context.original_exception):
        guard.refused = context.sqlalchemy_exception


def _begin_on_sqlite(connection: sa.Connection, _cursor: object, statement: str, *_: object) -> None:
    """Begin the transaction before the first statement that may write.

    Python's sqlite3 begins none before a savepoint, whose release would commit, and none before a WITH.
    """
    reads = statement.lstrip().upper().startswith(("SELECT", "PRAGMA", "EXPLAIN", "BEGIN"))
    if not reads and not connection.connection.driver_connection.in_transaction:  # type: ignore[union-attr]
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _guard_of(session: Session) -> CommitGuard:
    guard: CommitGuard = session.info[_KEY]
    return guard


def _isolate(connection: sa.Connection) -> None:
    """On MariaDB and MySQL run the transaction as READ COMMITTED, unless the application has chosen a level.

    Under their default, REPEATABLE READ, a later MariaDB refuses the completion of a key whose lease was renewed meanwhile.
    """
    if dialect_of(connection) == "mysql" and isolation_level_of(connection) is None:
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
