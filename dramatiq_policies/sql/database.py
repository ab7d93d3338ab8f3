"""`SqlDatabase`: the library's statements on separate connections, beside the pool of your engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar
from weakref import finalize

from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import AssertionPool, NullPool, StaticPool

from ..common.forks import after_fork
from ..transactions.database import Connection, place_of
from ..transactions.session import in_transaction, repeated, session_settings
from .calls import AsyncMemoryCalls, LoopCalls, MemoryCalls, ThreadCalls
from .connection import SqlConnection, dialect_of, is_in_memory, sync_engine_of

__all__ = ["SqlDatabase"]

T = TypeVar("T")

#: Connections of a parent process: a child neither uses nor closes them.
_inherited: list[object] = []


class SqlDatabase:
    """Connections beside the pool of an engine, made in the same way: a `Database` of `dramatiq_policies.transactions`.

    The library's calls never wait for a connection of the application, and never join its transactions. Only for an SQLite database in
    memory the library uses the application's connection: another connection would see another database.

    Parameters:
      engine: A sync or async engine.
      connections: The most connections of this process; always one on SQLite, or if the engine's pool has one.
      patience: Milliseconds until a call without an answer raises.
    """

    def __init__(self, engine: Engine | AsyncEngine, *, connections: int = 4, patience: int = 5_000) -> None:
        self.engine = engine
        self.dialect = dialect_of(engine)
        pool = engine.pool
        #: Whether the database is in the memory of this process.
        self.in_memory = is_in_memory(engine)
        # SQLite has one writer: threads queue for one connection instead of racing for the file's lock.
        single = self.dialect == "sqlite" or isinstance(pool, (StaticPool, AssertionPool))
        self._connections = 1 if single else connections
        self._patience = patience
        self._end: finalize[Any, Any] | None = None
        self._open()
        after_fork(self)

    @property
    def place(self) -> str:
        url = self.engine.url
        return place_of(self.dialect, url.host, url.port, url.database)

    def _open(self) -> None:
        engine = self.engine
        self._calls: ThreadCalls | LoopCalls | MemoryCalls
        if self.in_memory:
            self._calls = AsyncMemoryCalls(engine) if isinstance(engine, AsyncEngine) else MemoryCalls(engine)
        else:
            own = _beside(sync_engine_of(engine), self._patience)
            if isinstance(engine, AsyncEngine):
                self._calls = LoopCalls(AsyncEngine(own), self._connections)
            else:
                self._calls = ThreadCalls(own, self._connections)
        self._end = finalize(self, self._calls.close)

    def reset_after_fork(self) -> None:
        """Start with new connections; the application's engine too."""
        if self._end is not None:
            self._end.detach()
        _inherited.append(self._calls)
        if not self.in_memory:
            sync_engine = sync_engine_of(self.engine)
            _inherited.append(sync_engine.pool)
            sync_engine.dispose(close=False)
        self._open()

    def close(self) -> None:
        """Close the connections. The next call opens new ones."""
        if self._end is not None:
            self._end.detach()
        self._calls.close()
        self._open()

    def run(self, work: Callable[[Connection], T]) -> T:
        # If the server has closed one connection of the pool, discard the pool's other connections too.
        return repeated(partial(self._calls.call, work), self._patience)

    def transaction(self, work: Callable[[Connection], T]) -> T:
        return self.run(work if self.in_memory else partial(_in_transaction, work))


def _beside(engine: Engine, patience: int) -> Engine:
    """Return an engine with separate connections, made like ``engine``'s; each statement commits by itself."""
    pool = engine.pool.recreate()
    dialect = engine.dialect
    # Without a pool here there may be an outside pool (PgBouncer), and other clients get its connections after us.
    settings = [] if isinstance(pool, NullPool) else session_settings(dialect_of(engine), patience)

    def prepare(dbapi_connection: Any, _record: Any) -> None:
        # A listener of the application may have begun a transaction: ``SET search_path``.
        dbapi_connection.commit()
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


def _in_transaction(work: Callable[[Connection], T], connection: Connection) -> T:
    assert isinstance(connection, SqlConnection)
    return in_transaction(work, connection, connection.connection.invalidate)
