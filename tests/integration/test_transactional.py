"""Transactional jobs on PostgreSQL and MariaDB, with sync and async drivers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from ..transactions.transactional_jobs import Base, Shop, TransactionalJobs
from .databases import async_engine, make_empty_tables, with_driver


class TestOnServers(TransactionalJobs):
    @pytest.fixture(params=["postgresql", "mariadb"])
    def database_url(self, request: pytest.FixtureRequest) -> str:
        url: str = request.getfixturevalue(f"{request.param}_url")
        make_empty_tables(url)
        return url

    @pytest.fixture(params=["sync", "async"])
    def shop(self, request: pytest.FixtureRequest, database_url: str) -> Iterator[Any]:
        sync = sa.create_engine(with_driver(database_url))
        Base.metadata.drop_all(sync)
        Base.metadata.create_all(sync)
        shop = Shop(sync, sync if request.param == "sync" else async_engine(database_url))
        yield shop
        shop.close()
        sync.dispose()
