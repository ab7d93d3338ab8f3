"""Transactional jobs on SQLite and a StubBroker; on servers in tests/integration."""

from __future__ import annotations

import sqlite3
import time

import pytest
import sqlalchemy as sa
from dramatiq.asyncio import get_event_loop_thread
from dramatiq.middleware import AsyncIO
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, QueuePool, StaticPool

from dramatiq_policies import ConfigurationError, TimeoutExceeded
from dramatiq_policies.idempotency.store_client import StoreDown
from dramatiq_policies.sql import create_tables
from dramatiq_policies.sql.database import SqlDatabase
from dramatiq_policies.sql.job_session import JobSession
from dramatiq_policies.sql.unit_of_work import SqlUnitOfWorkFactory

from ..transactions.transactional_jobs import ONCE, Base, Payment, Shop, TransactionalJobs


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
        shop = Shop(engine, engine if request.param == "sync" else create_async_engine(url, poolclass=NullPool))
        yield shop
        shop.close()

    def test_an_error_after_a_write_with_a_common_table_expression_leaves_nothing(self, shop):
        async def body(job, order):
            if order == 7:
                await job.add(Payment(order=order))
                return
            await job.call("execute", sa.text('WITH new AS (SELECT 8 AS number) UPDATE payments SET "order" = 8'))
            raise RuntimeError

        pay = shop.actor(body)
        pay.send(7)
        pay.send(8)
        shop.drain()
        assert shop.payments() == [7]

    @pytest.mark.parametrize("is_long", [True, False])
    @pytest.mark.parametrize("error", [sqlite3.OperationalError("database is locked"), ConnectionResetError("lost")])
    def test_only_a_conflict_at_the_end_of_a_long_job_advises_a_longer_lease(
        self, shop, monkeypatch, caplog, error, is_long
    ):
        async def body(job, order):
            await job.add(Payment(order=order))
            if is_long:
                # As if a third of the lease had passed.
                monkeypatch.setattr(shop.idempotency.claims, "lease", 0)

        shop.actor(body, retry_on={Exception: ONCE}).send(7)
        with shop.failing_commit(after=False, error=error):
            shop.drain()
        assert (shop.payments(), shop.outcomes()) == ([], [("dead", "exhausted")])
        is_conflict = isinstance(error, sqlite3.OperationalError)
        assert ("Set a longer Idempotency(lease=…)" in caplog.text) is (is_conflict and is_long)

    @pytest.mark.parametrize("fails", [True, False])
    def test_a_session_that_does_not_close_changes_no_outcome_and_keeps_no_connection(
        self, shop, monkeypatch, caplog, fails
    ):
        async def body(job, order):
            await job.add(Payment(order=order))
            if fails:
                raise IndexError

        shop.actor(body, discard_on=IndexError).send(7)
        with monkeypatch.context() as patch:
            patch.setattr(JobSession, "close", lambda session: 1 / 0)
            shop.drain()
        assert shop.outcomes() == [("discarded" if fails else "succeeded", None)]
        assert shop.payments() == ([] if fails else [7])
        assert shop.checked_out == 0
        assert "The session of a job did not close cleanly" in caplog.text


def test_the_one_writer_of_sqlite_neither_loses_its_claim_nor_stops_the_renewal_of_others(engine):
    shop = Shop(engine, engine)
    shop.store.database.close()
    shop.store.database = SqlDatabase(engine, patience=200)
    claims = shop.idempotency.claims

    async def body(job, order):
        await job.add(Payment(order=order))
        began = time.monotonic()
        with pytest.raises(StoreDown):
            claims.leases.renew()
        assert time.monotonic() - began < 5

    shop.actor(body).send(7)
    shop.drain()
    claims.leases.renew()
    assert (shop.payments(), shop.outcomes()) == ([7], [("succeeded", None)])
    shop.close()


def test_a_block_that_an_interrupt_left_open_takes_no_messages_of_later_jobs(engine):
    shop = Shop(engine, engine)

    def interrupted():
        # As if the interrupt had struck between the begin of a block and its body.
        shop.outbox.within(Session(engine)).__enter__()
        while True:
            time.sleep(0.01)

    shop.stage.actor(interrupted, timeout=100, retry_on={TimeoutExceeded: ONCE}).send()
    shop.stage.actor(lambda: shop.note.send(1), actor_name="later")
    with shop.stage.working():
        shop.stage.drain()
        shop.broker.actors["later"].send()
        shop.stage.drain()
    assert shop.done == [(1,)]
    shop.close()


@pytest.mark.parametrize("end", ["commit", "timeout"])
def test_a_database_in_memory_outlasts_a_refused_commit_and_a_timeout(end):
    engine = sa.create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    create_tables(engine)
    Base.metadata.create_all(engine)
    shop = Shop(engine, engine)

    async def body(job, order):
        await job.add(Payment(order=order))
        if order == 1:
            await (job.call("commit") if end == "commit" else job.sleep(5))

    pay = shop.actor(body, retry_on={Exception: ONCE, TimeoutExceeded: ONCE})
    # After the boot: the worker's main thread calls the store on the connection of the jobs.
    with shop.stage.working():
        for order, timeout in ((1, 300), (2, None)):
            pay.send_with_options(args=(order,), timeout=timeout)
            shop.stage.drain()
    assert (shop.payments(), shop.stage.outcomes("pay")) == ([2], ["dead", "succeeded"])
    shop.close()


@pytest.mark.parametrize("interrupted", [True, False])
def test_the_connection_of_an_interrupted_job_is_not_used_again(tmp_path, interrupted):
    """An interrupt between a query and its answer leaves the answer to the next query."""
    engine = sa.create_engine(f"sqlite:///{tmp_path}/shop.db", poolclass=QueuePool)
    work = SqlUnitOfWorkFactory(engine, lambda session: None, lambda other: False).make(is_async=False)
    used = work.session.connection().connection.driver_connection
    work.roll_back(interrupted=interrupted)
    with engine.connect() as connection:
        assert (connection.connection.driver_connection is used) is not interrupted
    engine.dispose()


@pytest.fixture
def loop():
    """Runs coroutines on Dramatiq's event loop."""
    middleware = AsyncIO()
    middleware.before_worker_boot(None, None)
    yield get_event_loop_thread().run_coroutine
    middleware.after_worker_shutdown(None, None)


@pytest.mark.parametrize("end", ["interrupt", "refused commit", "error"])
def test_the_connection_of_an_async_job_is_not_used_again_after_an_interrupt_or_a_refused_commit(tmp_path, loop, end):
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/shop.db", poolclass=AsyncAdaptedQueuePool)
    work = SqlUnitOfWorkFactory(engine, lambda session: None, lambda other: False).make(is_async=True)

    async def begin():
        connection = await work.session.connection()
        if end == "refused commit":
            with pytest.raises(ConfigurationError, match="must not commit"):
                await connection.commit()
        return (await connection.get_raw_connection()).driver_connection

    async def next_connection():
        async with engine.connect() as connection:
            return (await connection.get_raw_connection()).driver_connection

    used = loop(begin())
    work.roll_back(interrupted=end == "interrupt")
    assert (loop(next_connection()) is used) is (end == "error")
    loop(engine.dispose())


def test_an_async_job_that_outlives_the_event_loop_keeps_its_own_error(tmp_path, caplog):
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/shop.db")
    work = SqlUnitOfWorkFactory(engine, lambda session: None, lambda other: False).make(is_async=True)
    work.roll_back(interrupted=True)
    (line,) = caplog.records
    assert "could not be rolled back" in line.getMessage()
    assert str(line.exc_info[1]) == "Dramatiq's event loop has ended."
