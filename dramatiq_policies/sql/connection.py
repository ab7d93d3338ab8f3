"""Connections of SQLAlchemy, and of a driver below, as a `Connection` of `dramatiq_policies.transactions`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from ..errors import ConfigurationError
from ..transactions.database import Result

__all__ = [
    "DriverConnection",
    "SqlConnection",
    "checked_engine",
    "dialect_of",
    "is_in_memory",
    "isolation_level_of",
    "sync_engine_of",
]

_DIALECTS = {"postgresql": "postgresql", "mysql": "mysql", "mariadb": "mysql", "sqlite": "sqlite"}
_TYPES: dict[type, Any] = {int: sa.BigInteger(), str: sa.String(), bytes: sa.LargeBinary()}


def checked_engine(where: str, engine: object) -> Engine | AsyncEngine:
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
        expected = "an engine of PostgreSQL, MariaDB, MySQL or SQLite"
        raise ConfigurationError.of_option(where, "engine", expected, engine.dialect.name)
    return engine


def dialect_of(bind: Engine | AsyncEngine | sa.Connection) -> str:
    """Return ``"postgresql"``, ``"mysql"`` (MariaDB too) or ``"sqlite"``."""
    return _DIALECTS[bind.dialect.name]


def sync_engine_of(engine: Engine | AsyncEngine) -> Engine:
    """Return the sync engine: of an async engine the engine below."""
    return engine.sync_engine if isinstance(engine, AsyncEngine) else engine


def is_in_memory(engine: Engine | AsyncEngine) -> bool:
    """Return whether the database is in the memory of this process, and ends with its connection."""
    return dialect_of(engine) == "sqlite" and isinstance(engine.pool, (StaticPool, SingletonThreadPool))


def isolation_level_of(bind: Engine | sa.Connection) -> str | None:
    """Return the isolation level that the application has chosen; None for the server's default."""
    level: str | None = bind.get_execution_options().get("isolation_level")
    return getattr(bind.dialect, "_on_connect_isolation_level", None) if level is None else level


class SqlConnection:
    """A connection of SQLAlchemy. The caller begins and ends the transaction."""

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
        # Cursors of psycopg have no such attribute.
        last_id = None if self.dialect == "postgresql" else found.lastrowid
        return Result((), found.rowcount, last_id)


@lru_cache(maxsize=256)
def _statement(sql: str, kinds: tuple[tuple[str, type], ...]) -> sa.TextClause:
    # asyncpg takes an int for 32 bits unless the parameter has a type.
    typed = [sa.bindparam(name, type_=_TYPES[kind]) for name, kind in kinds if kind in _TYPES]
    return sa.text(sql).bindparams(*typed)


class DriverConnection:
    """A connection of an SQLite driver, which neither begins nor ends a transaction of SQLAlchemy."""

    __slots__ = ("dbapi_connection", "dialect")

    def __init__(self, dbapi_connection: Any) -> None:
        self.dbapi_connection = dbapi_connection
        self.dialect = "sqlite"

    def execute(self, sql: str, /, **params: Any) -> Result:
        cursor = self.dbapi_connection.cursor()
        try:
            cursor.execute(sql, params)
            if cursor.description is not None:
                rows = [tuple(row) for row in cursor.fetchall()]
                return Result(rows, len(rows))
            return Result((), cursor.rowcount, cursor.lastrowid)
        finally:
            cursor.close()
