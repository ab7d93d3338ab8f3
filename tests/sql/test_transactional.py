"""Transactional jobs on SQLite and a StubBroker; on servers in tests/integration."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from dramatiq_policies.sql import create_tables

from ..transactions.transactional_jobs import Base, Shop, TransactionalJobs


@pytest.fixture
def engine(tmp_path):
    engine = sa.create_engine(f"sqlite:///{tmp_path}/shop.db")
    create_tables(engine)
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


class TestOnSqlite(TransactionalJobs):
    @pytest.fixture(params=["sync", "async"])
    def shop(self, engine, request):
        url = f"sqlite+aiosqlite:///{engine.url.database}"
        shop = Shop(engine, engine if request.param == "sync" else create_async_engine(url))
        yield shop
        shop.close()
