"""DjangoStore passes the contract of stores, on each database."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dramatiq_policies.contrib.django import DjangoStore
from dramatiq_policies.testing import IdempotencyStoreContract

from ..contrib.django import project
from .databases import make_empty_tables

project.set_up()


def store_on(url: str) -> Iterator[DjangoStore]:
    make_empty_tables(url)
    with project.database("contract", **project.options_of(url)):
        store = DjangoStore("contract", namespace="contract")
        yield store
        store.database.close()  # type: ignore[attr-defined]


class OnADatabase(IdempotencyStoreContract):
    busy = 4
    # A hundred threads share four connections.
    short = 600
    rivals = 25


class TestOnPostgreSQL(OnADatabase):
    @pytest.fixture
    def store(self, postgresql_url: str) -> Iterator[DjangoStore]:
        yield from store_on(postgresql_url)


class TestOnMariaDB(OnADatabase):
    @pytest.fixture
    def store(self, mariadb_url: str) -> Iterator[DjangoStore]:
        yield from store_on(mariadb_url)


class TestOnSQLite(OnADatabase):
    # SQLite keeps its locks per process: a child takes those of a thread that was busy for its own.
    busy = 0

    @pytest.fixture
    def store(self, sqlite_url: str) -> Iterator[DjangoStore]:
        yield from store_on(sqlite_url)
