"""Databases of a test's own on the servers of POSTGRESQL_URL and MARIADB_URL, and the contract of a store on a database."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from dramatiq_policies.sql import metadata
from dramatiq_policies.testing import IdempotencyStoreContract

SYNC = {"postgresql": "psycopg", "mariadb": "pymysql", "mysql": "pymysql", "sqlite": "pysqlite"}
ASYNC = {"postgresql": "asyncpg", "mariadb": "asyncmy", "mysql": "asyncmy", "sqlite": "aiosqlite"}


def with_driver(url: str, drivers: dict[str, str] = SYNC) -> str:
    """SQLAlchemy's URL: ``postgresql://…`` becomes ``postgresql+psycopg://…``."""
    kind, rest = url.split("://", 1)
    return f"{kind}+{drivers[kind]}://{rest}"


def async_engine(url: str, **options: Any) -> AsyncEngine:
    return create_async_engine(with_driver(url, ASYNC), **options)


class OnADatabase(IdempotencyStoreContract):
    busy = 4
    # A hundred threads share four connections.
    short = 600
    rivals = 25


class OnSQLite(OnADatabase):
    # SQLite keeps its locks per process: a child takes those of a thread that was busy for its own.
    busy = 0


@contextmanager
def own_database(server_url: str) -> Iterator[str]:
    """Make a database on a server, and drop it at the end. The URL has no driver."""
    name = f"dp_test_{uuid.uuid4().hex[:16]}"
    server = sa.create_engine(with_driver(server_url), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with server.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    try:
        yield sa.make_url(server_url).set(database=name).render_as_string(hide_password=False)
    finally:
        # Workers that were killed have left connections.
        force = " WITH (FORCE)" if server.dialect.name == "postgresql" else ""
        with server.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name}{force}")


def make_empty_tables(url: str) -> None:
    """Make the tables of dramatiq_policies, or empty them."""
    engine = sa.create_engine(with_driver(url), poolclass=sa.NullPool)
    with engine.begin() as connection:
        metadata.create_all(connection)
        for table in metadata.sorted_tables:
            connection.execute(table.delete())


@contextmanager
def deadlocking(engine: sa.Engine) -> Iterator[Callable[[int], str]]:
    """Yield the statements, by number, that lock a row each. Whoever runs the first and then the second is the victim of a deadlock."""
    table = f"locked_{uuid.uuid4().hex[:8]}"
    update = f"UPDATE {table} SET again = again + 1 WHERE number = {{}}"
    begun = threading.Event()

    def other() -> None:
        with engine.connect() as connection:
            # InnoDB rolls back the transaction with the fewest changes.
            connection.exec_driver_sql(f"UPDATE {table} SET again = again + 1 WHERE number > 1")
            begun.set()
            connection.exec_driver_sql(f"SELECT SLEEP(0.3) FROM {table} LIMIT 1")
            connection.exec_driver_sql(update.format(1))
            connection.rollback()

    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE TABLE {table} (number INT PRIMARY KEY, again INT NOT NULL)")
        connection.exec_driver_sql(f"INSERT INTO {table} VALUES {', '.join(f'({n}, 0)' for n in range(1, 201))}")
    thread = threading.Thread(target=other)

    def statement(number: int) -> str:
        if number == 2:
            thread.start()
            assert begun.wait(20)
        return update.format(number)

    try:
        yield statement
    finally:
        thread.join()
