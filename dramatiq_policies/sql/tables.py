"""The tables of dramatiq_policies, for Alembic and for `create_tables`. Django's migrations make the same tables."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, MetaData, String, Table
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.mysql import LONGBLOB, MEDIUMBLOB
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.schema import CreateIndex, CreateTable

from ..transactions.database import KEYS, OUTBOX, Connection
from .connection import SqlConnection, checked_engine
from .database import SqlDatabase

__all__ = ["HOW_TO_CREATE", "create_tables", "keys", "metadata", "outbox"]

#: The advice for a missing table.
HOW_TO_CREATE = (
    "call dramatiq_policies.sql.create_tables(engine) when you deploy, or let Alembic create the tables of "
    "dramatiq_policies.sql.metadata"
)

#: Both tables: ``target_metadata = [Base.metadata, metadata]`` in Alembic's ``env.py``.
metadata = MetaData()

_MARIADB: dict[str, Any] = {
    "mysql_engine": "InnoDB",
    "mysql_charset": "utf8mb4",
    "mariadb_engine": "InnoDB",
    "mariadb_charset": "utf8mb4",
}

#: A row for each key: the register of an idempotency store.
keys = Table(
    KEYS,
    metadata,
    # The hex digest of namespace and key, because MariaDB compares texts without regard to case.
    Column("name", String(64), primary_key=True),
    Column("value", LargeBinary().with_variant(MEDIUMBLOB(), "mysql", "mariadb"), nullable=False),
    # Milliseconds since the epoch, by the database's clock, as all times here.
    Column("expires_at", BigInteger, nullable=False),
    Index("dramatiq_policies_keys_expires", "expires_at"),
    **_MARIADB,
)

#: A row for each message that is committed and not yet published.
outbox = Table(
    OUTBOX,
    metadata,
    Column("id", BigInteger().with_variant(Integer(), "sqlite"), primary_key=True, autoincrement=True),
    Column("namespace", String(64), nullable=False),
    # "message", or "member": count this member of a group.
    Column("kind", String(16), nullable=False),
    Column("message_id", String(255), nullable=False),
    Column("actor", String(255), nullable=False),
    Column("queue", String(255), nullable=False),
    Column("body", LargeBinary().with_variant(LONGBLOB(), "mysql", "mariadb"), nullable=False),
    # The delay asked for, in milliseconds.
    Column("delay", BigInteger, nullable=True),
    Column("created_at", BigInteger, nullable=False),
    # The end of a lease, or the time of the next try: a row may be taken from then on.
    Column("due_at", BigInteger, nullable=False),
    Column("owner", String(64), nullable=False),
    Column("failures", Integer, nullable=False),
    Column("error", String(1000), nullable=False),
    Index("dramatiq_policies_outbox_due", "namespace", "due_at"),
    **_MARIADB,
)


def create_tables(engine: Engine | AsyncEngine) -> None:
    """Create the tables of dramatiq_policies, unless they exist::

        create_tables(engine)                                     # a sync or an async engine, from sync code

        async with engine.begin() as connection:                  # from async code
            await connection.run_sync(metadata.create_all)

    Call it when you deploy, not in each worker. If you have migrations, use `metadata` for Alembic instead.

    Raises:
      ConfigurationError: The argument is no engine.
    """
    database = SqlDatabase(checked_engine("create_tables()", engine), connections=1, patience=60_000)
    try:
        database.run(_create)
    except DBAPIError:
        # Another process may have created a table meanwhile. If not, the error comes again.
        database.run(_create)
    finally:
        database.close()


def _create(connection: Connection) -> None:
    if isinstance(connection, SqlConnection):
        metadata.create_all(connection.connection)
        return
    # The driver's own connection to an SQLite database in memory.
    for table in metadata.sorted_tables:
        connection.execute(str(CreateTable(table, if_not_exists=True).compile(dialect=sqlite.dialect())))
        for index in table.indexes:
            connection.execute(str(CreateIndex(index, if_not_exists=True).compile(dialect=sqlite.dialect())))
