"""`SqlDatabase`: statements of the library on connections of its own, beside the pool of your engine."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from ..common import clock
from ..common.forks import after_fork
from ..errors import ConfigurationError
from ..transactions.database import Connection, Result, is_disconnect, is_transient
from .tables import metadata

__all__ = ["SqlConnection", "SqlDatabase", "checked_engine", "create_tables", "dialect_of"]

T = TypeVar("T")

_DIALECTS = {"postgresql": "postgresql", "mysql": "mysql", "mariadb": "mysql", "sqlite": "sqlite"}
_TYPES: dict[type, Any] = {int: sa.BigInteger(), str: sa.String(), bytes: sa.LargeBinary()}
_BEGIN = {
    "postgresql": ["BEGIN ISOLATION LEVEL READ COMMITTED"],
    "mysql": ["SET TRANSACTION ISOLATION LEVEL READ COMMITTED", "START TRANSACTION"],
    "sqlite": ["BEGIN IMMEDIATE"],
}
#: Tries on a deadlock, a serialization failure or a lock.
_TRIES = 10


def checked_engine(where: str, engine: Any) -> Engine | AsyncEngine:
    """Return the engine of an argument.

    Raises:
      ConfigurationError: The value is no engine, or an engine of another kind of database.
    """
    if not isinstance(engine, (Engine, AsyncEngine)):
        do = "Pass create_engine(url)" if isinstance(engine, (str, sa.URL)) else ""
        raise ConfigurationError.of_option(
            where, "engine", "an Engine or AsyncEngine of SQLAlchemy", engine, do, secret=True
        )
    if engine.dialect.name not in _DIALECTS:
        raise ConfigurationError.of_option(
            where, "engine", "an engine of PostgreSQL, MariaDB, MySQL or SQLite", engine.dialect.name
        )
    return engine


def dialect_of(bind: Engine | AsyncEngine | sa.Connection) -> str:
    """Return ``"postgresql"``, ``"mysql"`` (MariaDB too) or ``"sqlite"``."""
    return _DIALECTS[bind.dialect.name]


class SqlConnection:
    """A connection of SQLAlchemy, in whatever transaction it is, as a `Connection` of `dramatiq_policies.transactions`."""

    __slots__ = ("connection", "dialect")

    def __init__(self, connection: sa.Connection) -> None:
        self.connection = connection
        self.dialect = dialect_of(connection)

    def execute(self, sql: str, /, **params: Any) -> Result:
        kinds = tuple((name, type(value)) for name, value in params.items())
        found = self.connection.execute(_statement(sql, kinds), params)
        if found.returns_rows:
            rows = [tuple(row) for row in found]
            return Result(rows, len(rows))
        return Result((), found.rowcount)


@lru_cache(maxsize=256)
def _statement(sql: str, kinds: tuple[tuple[str, type], ...]) -> sa.TextClause:
    # asyncpg takes an int for 32 bits unless the parameter has a type.
    typed = [sa.bindparam(name, type_=_TYPES[kind]) for name, kind in kinds if kind in _TYPES]
    return sa.text(sql).bindparams(*typed)


class SqlDatabase:
    """Connections beside the pool of an engine, made in the same way: a `Database` of `dramatiq_policies.transactions`.

    An engine in memory (SQLite) is used itself, because another connection would see another database.

    Parameters:
      engine: A sync or async engine.
      connections: How many connections this process may use at once.
      patience: For how long a call waits for a free connection, in milliseconds.
    """

    def __init__(self, engine: Engine | AsyncEngine, *, connections: int = 4, patience: int = 5_000) -> None:
        self.engine = engine
        self.dialect = dialect_of(engine)
        self._connections = connections
        self._patience = patience / 1_000
        self._sync_engine = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
        self._shares = isinstance(self._sync_engine.pool, (StaticPool, SingletonThreadPool))
        self._loop: _Loop | None = None
        self._open()
        after_fork(self)

    def _open(self) -> None:
        self._free = threading.BoundedSemaphore(self._connections)
        self._own = self._sync_engine if self._shares else _beside(self._sync_engine)
        self._lock = threading.Lock()
        self._loop = None

    def reset_after_fork(self) -> None:
        self._sync_engine.dispose(close=False)
        self._open()

    def run(self, work: Callable[[Connection], T]) -> T:
        return self._repeated(work)

    def transaction(self, work: Callable[[Connection], T]) -> T:
        return self._repeated(work if self._shares else partial(_in_transaction, work))

    def _repeated(self, work: Callable[[Connection], T]) -> T:
        reconnected = False
        for tries in range(_TRIES):
            try:
                return self._once(work)
            except Exception as error:
                if is_disconnect(error) and not reconnected:
                    reconnected = True
                elif not is_transient(error) or tries + 1 == _TRIES:
                    raise
            clock.sleep(random.uniform(0, 0.005 * 2 ** min(tries, 5)))  # noqa: S311 - no secret
        raise AssertionError("unreachable")

    def _once(self, work: Callable[[Connection], T]) -> T:
        if not self._free.acquire(timeout=self._patience):
            raise TimeoutError(f"None of {self._connections} connections was free within {self._patience:g} s")
        try:
            if isinstance(self.engine, AsyncEngine):
                return self._own_loop().run(AsyncEngine(self._own), partial(self._call, work))
            with self._own.connect() as connection:
                return self._call(work, connection)
        finally:
            self._free.release()

    def _call(self, work: Callable[[Connection], T], connection: sa.Connection) -> T:
        joined = self._shares and _is_in_transaction(connection)
        answer = work(SqlConnection(connection))
        if self._shares and not joined:
            connection.commit()
        return answer

    def close(self) -> None:
        """Close the connections. The next call opens new ones."""
        own, loop = self._own, self._loop
        if self._shares:
            return
        self._open()
        if loop is None:
            own.dispose()
        else:
            loop.close(AsyncEngine(own))

    def _own_loop(self) -> _Loop:
        with self._lock:
            if self._loop is None:
                self._loop = _Loop()
            return self._loop


def _beside(engine: Engine) -> Engine:
    """Return an engine with connections of its own on which each statement commits by itself."""
    pool = engine.pool.recreate()
    dialect = engine.dialect

    def autocommit(dbapi_connection: Any, _record: Any) -> None:
        dialect.set_isolation_level(dbapi_connection, "AUTOCOMMIT")

    # The dispatch of a new pool is a copy: the engine's own connections stay as they are.
    event.listen(pool, "connect", autocommit)
    return Engine(pool, dialect, engine.url, hide_parameters=True)


def _in_transaction(work: Callable[[Connection], T], connection: Connection) -> T:
    try:
        for statement in _BEGIN[connection.dialect]:
            connection.execute(statement)
        answer = work(connection)
        connection.execute("COMMIT")
    except BaseException:
        try:
            connection.execute("ROLLBACK")
        except DBAPIError:
            assert isinstance(connection, SqlConnection)
            connection.connection.invalidate()
        raise
    return answer


def _is_in_transaction(connection: sa.Connection) -> bool:
    """Whether the application has begun a transaction on the same connection of SQLite."""
    driver = connection.connection.driver_connection
    return bool(getattr(driver, "in_transaction", False))


class _Loop:
    """An event loop in a thread of its own: connections of async drivers belong to a loop."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._serve, name="dramatiq-policies-sql", daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        try:
            self.loop.run_forever()
        finally:
            self.loop.close()

    def run(self, engine: AsyncEngine, work: Callable[[sa.Connection], T]) -> T:
        async def call() -> T:
            async with engine.connect() as connection:
                return await connection.run_sync(work)

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result()

    def close(self, engine: AsyncEngine) -> None:
        asyncio.run_coroutine_threadsafe(engine.dispose(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()


def create_tables(engine: Engine | AsyncEngine) -> None:
    """Create the tables of dramatiq_policies, unless they exist::

        create_tables(engine)                                     # a sync or an async engine, from sync code

        async with engine.begin() as connection:                  # from async code
            await connection.run_sync(metadata.create_all)

    Call it when you deploy, not in each worker. Use `metadata` for Alembic instead if you have migrations.

    Raises:
      ConfigurationError: The argument is no engine.
    """
    database = SqlDatabase(checked_engine("create_tables()", engine), connections=1)
    try:
        database.run(_create)
    except DBAPIError:
        # Another process may have created a table meanwhile. If not, the error comes again.
        database.run(_create)
    finally:
        database.close()


def _create(connection: Connection) -> None:
    assert isinstance(connection, SqlConnection)
    metadata.create_all(connection.connection)
