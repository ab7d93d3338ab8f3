"""`SqlDatabase`: statements of the library on connections of its own, beside the pool of your engine."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar
from weakref import finalize

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import NullPool, SingletonThreadPool, StaticPool

from ..common.forks import after_fork
from ..transactions.database import Connection, is_disconnect, is_transient
from .calls import AsyncMemoryCalls, LoopCalls, MemoryCalls, ThreadCalls
from .connection import SqlConnection, checked_engine, dialect_of

__all__ = ["SqlConnection", "SqlDatabase", "checked_engine", "dialect_of"]

T = TypeVar("T")

_BEGIN = {
    "postgresql": ["BEGIN ISOLATION LEVEL READ COMMITTED"],
    "mysql": ["START TRANSACTION"],
    "sqlite": ["BEGIN IMMEDIATE"],
}
#: For how long a statement waits for a lock, in milliseconds.
_LOCK_WAIT = 1_000
#: For how long a transaction may be idle, in milliseconds: a process that stands still must not hold its locks.
_IDLE = 5_000
#: Connections of a parent process: a child neither uses nor closes them.
_inherited: list[object] = []


class SqlDatabase:
    """Connections beside the pool of an engine, made in the same way: a `Database` of `dramatiq_policies.transactions`.

    The library's calls never wait for a connection of the application, and never join its transactions. Only an SQLite database in
    memory is called on the application's connection, because another connection would see another database.

    Parameters:
      engine: A sync or async engine.
      connections: How many connections this process may use at once; always one on SQLite.
      patience: After how long a call without an answer raises, in milliseconds.
    """

    def __init__(self, engine: Engine | AsyncEngine, *, connections: int = 4, patience: int = 5_000) -> None:
        self.engine = engine
        self.dialect = dialect_of(engine)
        # SQLite has one writer: threads wait in turn for one connection, and not in a race for the file's lock.
        self._connections = 1 if self.dialect == "sqlite" else connections
        self._patience = patience
        self._end: finalize[Any, Any] | None = None
        self._open()
        after_fork(self)

    def _open(self) -> None:
        engine = self.engine
        is_async = isinstance(engine, AsyncEngine)
        sync_engine = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
        self._calls: ThreadCalls | LoopCalls | MemoryCalls
        self._in_memory = isinstance(sync_engine.pool, (StaticPool, SingletonThreadPool))
        if self._in_memory:
            self._calls = AsyncMemoryCalls(engine) if isinstance(engine, AsyncEngine) else MemoryCalls(engine)
        else:
            own = _beside(sync_engine, self._patience)
            calls = LoopCalls(AsyncEngine(own), self._connections) if is_async else ThreadCalls(own, self._connections)
            self._calls = calls
        self._end = finalize(self, self._calls.close)

    def reset_after_fork(self) -> None:
        """Start with new connections; the application's engine too."""
        if self._end is not None:
            self._end.detach()
        _inherited.append(self._calls)
        if not self._in_memory:
            sync_engine = self.engine.sync_engine if isinstance(self.engine, AsyncEngine) else self.engine
            _inherited.append(sync_engine.pool)
            sync_engine.dispose(close=False)
        self._open()

    def close(self) -> None:
        """Close the connections. The next call opens new ones."""
        if self._end is not None:
            self._end()
        self._open()

    def run(self, work: Callable[[Connection], T]) -> T:
        deadline = time.monotonic() + self._patience / 1_000
        reconnected = False
        for tries in range(1_000):
            try:
                return self._calls.call(work, deadline)
            except Exception as error:
                if is_disconnect(error) and not reconnected:
                    # A connection of the pool was closed by the server. The others in the pool are not used either.
                    reconnected = True
                    continue
                pause = random.uniform(0.001, 0.01 * min(tries + 1, 10))  # noqa: S311 - no secret
                if not is_transient(error) or time.monotonic() + pause > deadline:
                    raise
            time.sleep(pause)
        raise AssertionError("unreachable")

    def transaction(self, work: Callable[[Connection], T]) -> T:
        return self.run(work if self._in_memory else partial(_in_transaction, work))


def _beside(engine: Engine, patience: int) -> Engine:
    """Return an engine with connections of its own, made as those of ``engine``, on which each statement commits by itself."""
    pool = engine.pool.recreate()
    dialect = engine.dialect
    # Without a pool here there may be one outside (PgBouncer), whose connections serve others after us.
    settings = [] if isinstance(pool, NullPool) else _settings(dialect_of(engine), patience)

    def prepare(dbapi_connection: Any, _record: Any) -> None:
        dialect.set_isolation_level(dbapi_connection, "AUTOCOMMIT")
        if dialect.name == "sqlite" and getattr(dbapi_connection, "autocommit", None) is False:
            # Python 3.12: the isolation level has no effect then.
            dbapi_connection.autocommit = True
        cursor = dbapi_connection.cursor()
        for statement in settings:
            cursor.execute(statement)
        cursor.close()

    # The listeners of a new pool are a copy: the engine's own connections stay as they are.
    event.listen(pool, "connect", prepare)
    return Engine(pool, dialect, engine.url, hide_parameters=True)


def _settings(dialect: str, patience: int) -> list[str]:
    """Return statements by which the server gives up, too. Else each call given up would leave a connection there."""
    if dialect == "postgresql":
        found = {
            "lock_timeout": _LOCK_WAIT,
            "statement_timeout": patience,
            "idle_in_transaction_session_timeout": _IDLE,
        }
        return [f"SET {name} = {ms}" for name, ms in found.items()]
    if dialect == "mysql":
        mariadb = f", max_statement_time = {patience / 1_000}, idle_transaction_timeout = {_IDLE // 1_000}"
        return [
            # The comment is for MariaDB alone.
            f"SET SESSION innodb_lock_wait_timeout = {_LOCK_WAIT // 1_000} /*M!100300 {mariadb} */",
            # Without locks on gaps, which claims of other keys would wait for.
            "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED",
        ]
    return [f"PRAGMA busy_timeout = {_LOCK_WAIT}"]


def _in_transaction(work: Callable[[Connection], T], connection: Connection) -> T:
    assert isinstance(connection, SqlConnection)
    try:
        for statement in _BEGIN[connection.dialect]:
            connection.execute(statement)
        answer = work(connection)
        connection.execute("COMMIT")
    except BaseException:
        try:
            connection.execute("ROLLBACK")
        except (DBAPIError, sa.exc.InvalidRequestError):
            connection.connection.invalidate()
        raise
    return answer
