"""DjangoStore passes the contract of stores, on each database."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dramatiq_policies.contrib.django import DjangoStore

from ..contrib.django import project
from .databases import OnADatabase, OnSQLite, make_empty_tables

project.set_up()


def store_on(url: str) -> Iterator[DjangoStore]:
    make_empty_tables(url)
    with project.database("contract", **project.options_of(url)):
        store = DjangoStore("contract", namespace="contract")
        yield store
        store.database.close()  # type: ignore[attr-defined]


class TestOnPostgreSQL(OnADatabase):
    @pytest.fixture
    def store(self, postgresql_url: str) -> Iterator[DjangoStore]:
        yield from store_on(postgresql_url)


class TestOnMariaDB(OnADatabase):
    @pytest.fixture
    def store(self, mariadb_url: str) -> Iterator[DjangoStore]:
        yield from store_on(mariadb_url)


class TestOnSQLite(OnSQLite):
    @pytest.fixture
    def store(self, sqlite_url: str) -> Iterator[DjangoStore]:
        yield from store_on(sqlite_url)
