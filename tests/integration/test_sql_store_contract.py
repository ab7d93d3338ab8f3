"""SqlStore passes the contract of stores: on each database, over a sync and an async engine, whatever the isolation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from dramatiq_policies.sql import SqlStore

from .databases import ASYNC, SYNC, OnADatabase, OnSQLite, make_empty_tables, with_driver


def store_on(url: str, drivers: dict[str, str], **options: Any) -> Iterator[SqlStore]:
    make_empty_tables(url)
    engine: Any = sa.create_engine(with_driver(url, drivers), **options)
    if drivers is ASYNC:
        engine = AsyncEngine(engine)
    store = SqlStore(engine, namespace="contract")
    yield store
    store.database.close()


class TestOnPostgreSQL(OnADatabase):
    @pytest.fixture
    def store(self, postgresql_url: str) -> Iterator[SqlStore]:
        yield from store_on(postgresql_url, SYNC)


class TestOnPostgreSQLAsync(OnADatabase):
    @pytest.fixture
    def store(self, postgresql_url: str) -> Iterator[SqlStore]:
        yield from store_on(postgresql_url, ASYNC)


class TestOnMariaDB(OnADatabase):
    @pytest.fixture
    def store(self, mariadb_url: str) -> Iterator[SqlStore]:
        yield from store_on(mariadb_url, SYNC)


class TestOnMariaDBAsync(OnADatabase):
    @pytest.fixture
    def store(self, mariadb_url: str) -> Iterator[SqlStore]:
        yield from store_on(mariadb_url, ASYNC)


class TestOnSQLite(OnSQLite):
    @pytest.fixture
    def store(self, sqlite_url: str) -> Iterator[SqlStore]:
        yield from store_on(sqlite_url, SYNC)


class TestOnSQLiteAsync(OnSQLite):
    @pytest.fixture
    def store(self, sqlite_url: str) -> Iterator[SqlStore]:
        yield from store_on(sqlite_url, ASYNC)
