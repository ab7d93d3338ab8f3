"""The transaction of a transactional job, with a Session or an AsyncSession."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from dramatiq.asyncio import async_to_sync, get_event_loop_thread
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from ..common.safe_logger import SafeLogger
from ..errors import ConfigurationError
from ..transactions.key_table import KeyTable
from .connection import SqlConnection, sync_engine_of
from .job_session import CommitGuard, JobSession, listen_to_connections
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
        listen_to_connections(sync_engine_of(self.engine))
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
            return AsyncSqlUnitOfWork(AsyncSession(self.engine, sync_session_class=JobSession), self.within)
        return SqlUnitOfWork(JobSession(self.engine), self.within)


class SqlUnitOfWork:
    """The transaction of a sync job."""

    def __init__(self, session: Session, within: Callable[[Session], EnteredScope[Scope]]) -> None:
        self.session = session
        self._within = within
        self._guard = CommitGuard(session)

    def run(self, delivery: Delivery, proceed: Proceed) -> Any:
        runner, fn, args, kwargs = delivery.job
        session = self.session

        @functools.wraps(fn)
        def run_and_flush(*given: Any, **named: Any) -> Any:
            result = fn(*given, **named)
            session.flush()
            return result

        delivery.job = (runner, run_and_flush, args, kwargs)
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
        self._guard = CommitGuard(session.sync_session)

    def run(self, delivery: Delivery, proceed: Proceed) -> Any:
        runner, fn, args, kwargs = delivery.job
        coroutine, session = vars(fn)["__wrapped__"], self.session

        @functools.wraps(coroutine)
        async def run_and_flush(*given: Any, **named: Any) -> Any:
            # A scope counts only in the entering task.
            async with self._within(session):
                result = await coroutine(*given, **named)
                await session.flush()
                return result

        delivery.job = (runner, async_to_sync(run_and_flush), args, kwargs)
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
