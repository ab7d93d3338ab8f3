"""The transaction of a transactional job, with a Session or an AsyncSession."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from dramatiq.asyncio import async_to_sync, get_event_loop_thread
from sqlalchemy import event
from sqlalchemy.engine import Engine, ExceptionContext
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from ..common.safe_logger import SafeLogger
from ..errors import ConfigurationError
from ..transactions.database import has_rolled_back
from ..transactions.key_table import KeyTable
from .connection import SqlConnection, dialect_of, is_in_memory, isolation_level_of, sync_engine_of
from .scopes import is_autocommit
from .store import SqlStore

if TYPE_CHECKING:
    from ..delivery.delivery import Delivery
    from ..delivery.executor import Proceed
    from ..transactions.outbox import Scope
    from ..transactions.scope import EnteredScope
    from ..transactions.unit_of_work import Finish, UnitOfWork

__all__ = ["SqlUnitOfWorkFactory"]

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


class SqlUnitOfWorkFactory:
    """Makes the transactions of transactional jobs.

    Parameters:
      engine: The engine of the outbox.
      within: `SqlOutbox.within`.
      is_same: Whether another engine is of the same database.
    """

    def __init__(
        self,
        engine: Engine | AsyncEngine,
        within: Callable[[Session | AsyncSession], EnteredScope[Scope]],
        is_same: Callable[[Engine | AsyncEngine], bool],
    ) -> None:
        # The connections come from the pool of the engine; the events concern transactional jobs only.
        self.engine = engine.execution_options(dramatiq_policies_job=True)
        sync_engine = sync_engine_of(self.engine)
        event.listen(sync_engine, "commit", _before_connection_commit)
        # Of all connections of the dialect.
        event.listen(sync_engine, "handle_error", _after_error)
        if sync_engine.dialect.name == "sqlite":
            event.listen(sync_engine, "before_cursor_execute", _begin_on_sqlite)
        self.within = within
        self.is_same = is_same

    def check(self, where: str, store: KeyTable, *, is_async: bool) -> None:
        """Check that an actor with keys in ``store`` can have units of work.

        Raises:
          ConfigurationError: The actor can't.
        """
        if not isinstance(store, SqlStore) or not self.is_same(store.engine):
            raise ConfigurationError(
                f"{where}: transactional=True needs keys and outbox in one database, and the keys are in another. Pass the same "
                "engine to SqlStore and SqlOutbox."
            )
        if is_autocommit(sync_engine_of(self.engine)):
            raise ConfigurationError(
                f"{where}: transactional=True needs transactions, and the engine has the isolation level AUTOCOMMIT. Pass SqlOutbox and "
                "SqlStore an engine without it."
            )
        if is_async != isinstance(self.engine, AsyncEngine):
            kind, maker = ("an async", "create_async_engine()") if is_async else ("a sync", "create_engine()")
            raise ConfigurationError(
                f"{where}: transactional=True needs {kind} engine, because the actor is {kind} actor. Pass SqlOutbox and SqlStore "
                f"an engine from {maker}."
            )

    def make(self, *, is_async: bool) -> UnitOfWork:
        """Return a unit of work for one run. Does not connect."""
        if isinstance(self.engine, AsyncEngine):
            return AsyncSqlUnitOfWork(AsyncSession(self.engine, sync_session_class=_JobSession), self.within)
        return SqlUnitOfWork(_JobSession(self.engine), self.within)


class SqlUnitOfWork:
    """The transaction of a sync job."""

    def __init__(self, session: Session, within: Callable[[Session], EnteredScope[Scope]]) -> None:
        self.session = session
        self._within = within
        self._guard = _CommitGuard(session)

    def run(self, delivery: Delivery, proceed: Proceed) -> Any:
        call, fn, args, kwargs = delivery.job
        session = self.session

        @functools.wraps(fn)
        def run_and_flush(*given: Any, **named: Any) -> Any:
            result = fn(*given, **named)
            session.flush()
            return result

        delivery.job = (call, run_and_flush, args, kwargs)
        with self._within(session):
            return proceed(delivery)

    def commit(self, finish: Finish) -> None:
        self._guard.raise_refused()
        block = self._within(self.session)
        with block as scope:
            finish(SqlConnection(self.session.connection()), scope)
            self._guard.open(block)
            self.session.commit()
        _close(self.session)

    def roll_back(self, *, interrupted: bool) -> None:
        if interrupted or self._guard.is_unsure:
            self._guard.invalidate()
        _close(self.session)


class AsyncSqlUnitOfWork:
    """The transaction of an async job, on Dramatiq's event loop."""

    def __init__(self, session: AsyncSession, within: Callable[[AsyncSession], EnteredScope[Scope]]) -> None:
        self.session = session
        self._within = within
        self._guard = _CommitGuard(session.sync_session)

    def run(self, delivery: Delivery, proceed: Proceed) -> Any:
        call, fn, args, kwargs = delivery.job
        coroutine, session = vars(fn)["__wrapped__"], self.session

        @functools.wraps(coroutine)
        async def run_and_flush(*given: Any, **named: Any) -> Any:
            # A scope counts only in the entering task.
            async with self._within(session):
                result = await coroutine(*given, **named)
                await session.flush()
                return result

        delivery.job = (call, async_to_sync(run_and_flush), args, kwargs)
        return proceed(delivery)

    def commit(self, finish: Finish) -> None:
        self._guard.raise_refused()
        _run_on_loop(self._commit(finish))

    async def _commit(self, finish: Finish) -> None:
        session = self.session
        block = self._within(session)
        async with block as scope:
            await session.run_sync(lambda sync: finish(SqlConnection(sync.connection()), scope))
            self._guard.open(block)
            await session.commit()
        await session.run_sync(_close)

    def roll_back(self, *, interrupted: bool) -> None:
        try:
            _run_on_loop(self._roll_back(interrupted or self._guard.is_unsure))
        except Exception:
            logger.exception(
                "The transaction of a job could not be rolled back. The worker drops the connection, and the database rolls back."
            )

    async def _roll_back(self, interrupted: bool) -> None:
        def roll_back(session: Session) -> None:
            if interrupted:
                self._guard.invalidate()
            _close(session)

        await self.session.run_sync(roll_back)


class _CommitGuard:
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


class _JobSession(Session):
    """The session of a transactional job. The class has the listeners: listeners per session would take longer."""

    def close(self) -> None:
        if self.in_transaction():
            _guard_of(self).note_close()
        super().close()


@event.listens_for(_JobSession, "after_begin")
def _after_begin(session: Session, _transaction: object, connection: sa.Connection) -> None:
    _guard_of(session).add(connection)


@event.listens_for(_JobSession, "before_commit")
def _before_commit(session: Session) -> None:
    # Also called at the release of a savepoint.
    if not session.in_nested_transaction():
        _guard_of(session).check_commit()


def _before_connection_commit(connection: sa.Connection) -> None:
    guard: _CommitGuard | None = vars(connection).get(_KEY)
    if guard is not None:
        guard.before_commit()


def _after_error(context: ExceptionContext) -> None:
    guard: _CommitGuard | None = vars(context.connection).get(_KEY) if context.connection is not None else None
    if guard is not None and has_rolled_back(context.original_exception):
        guard.refused = context.sqlalchemy_exception


def _begin_on_sqlite(connection: sa.Connection, _cursor: object, statement: str, *_: object) -> None:
    """Begin the transaction before the first statement that may write.

    Python's sqlite3 begins none before a savepoint, whose release would commit, and none before a WITH.
    """
    reads = statement.lstrip().upper().startswith(("SELECT", "PRAGMA", "EXPLAIN", "BEGIN"))
    if not reads and not connection.connection.driver_connection.in_transaction:  # type: ignore[union-attr]
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _guard_of(session: Session) -> _CommitGuard:
    guard: _CommitGuard = session.info[_KEY]
    return guard


def _isolate(connection: sa.Connection) -> None:
    """On MariaDB and MySQL run the transaction as READ COMMITTED, unless the application has chosen a level.

    Under their default, REPEATABLE READ, a later MariaDB refuses the completion of a key whose lease was renewed meanwhile.
    """
    if dialect_of(connection) == "mysql" and isolation_level_of(connection) is None:
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")


def _close(session: Session) -> None:
    """Roll back the rest of a session's transaction, and release the connections. Never raises."""
    try:
        session.close()
    except Exception:
        logger.exception("The session of a job did not close cleanly. The worker drops the connection.")
        with suppress(Exception):
            session.invalidate()


def _run_on_loop(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine on Dramatiq's event loop, and wait for the end."""
    thread = get_event_loop_thread()
    if thread is None:
        coroutine.close()
        raise RuntimeError("Dramatiq's event loop has ended.")
    asyncio.run_coroutine_threadsafe(coroutine, thread.loop).result()
