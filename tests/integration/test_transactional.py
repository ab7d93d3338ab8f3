"""Transactional jobs on PostgreSQL and MariaDB, with sync and async drivers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from dramatiq_policies import TimeoutExceeded, current_job

from ..proxy import Proxy
from ..transactions.transactional_jobs import ONCE, TWICE, Base, Payment, Shop, TransactionalJobs
from .databases import async_engine, deadlocking, make_empty_tables, with_driver
from .places import until


@pytest.fixture
def open_shop() -> Iterator[Callable[..., Shop]]:
    """Opens shops with empty tables, and closes them, also after a failure."""
    with ExitStack() as closing:

        def opened(sync: sa.Engine, engine: sa.Engine | AsyncEngine | None = None, **options: Any) -> Shop:
            closing.callback(sync.dispose)
            Base.metadata.drop_all(sync)
            Base.metadata.create_all(sync)
            shop = Shop(sync, sync if engine is None else engine, **options)
            closing.callback(shop.close)
            return shop

        yield opened


class TestOnServers(TransactionalJobs):
    @pytest.fixture(params=["sync", "async"])
    def shop(self, request: pytest.FixtureRequest, server_url: str, open_shop: Callable[..., Shop]) -> Shop:
        sync = sa.create_engine(with_driver(server_url))
        return open_shop(sync, None if request.param == "sync" else async_engine(server_url, poolclass=sa.NullPool))


@pytest.fixture(params=["REPEATABLE READ", "SERIALIZABLE"])
def strict_shop(server_url: str, request: pytest.FixtureRequest, open_shop: Callable[..., Shop]) -> Shop:
    """A shop with a stricter isolation than READ COMMITTED."""
    return open_shop(sa.create_engine(with_driver(server_url), isolation_level=request.param))


def test_under_a_stricter_isolation_a_conflict_goes_by_the_rules_and_the_effect_is_there_once(
    strict_shop: Shop,
) -> None:
    shop = strict_shop

    async def body(job: Any, order: int) -> None:
        await job.call("execute", sa.select(Payment))
        if current_job().attempt == 1:
            shop.idempotency.claims.leases.renew()
        await job.add(Payment(order=order))
        shop.note.send(current_job().attempt)

    shop.actor(body, retry_on={DBAPIError: TWICE}).send(7)
    shop.drain()
    attempts = len(shop.outcomes())
    assert (shop.payments(), shop.done) == ([7], [(attempts,)])
    assert shop.outcomes()[-1] == ("succeeded", None)
    assert shop.sync.dialect.name == "mariadb" or attempts == 2


def test_under_a_stricter_isolation_a_run_whose_key_was_taken_over_is_stale(strict_shop: Shop) -> None:
    shop = strict_shop

    async def body(job: Any, order: int) -> None:
        await job.call("execute", sa.select(Payment))
        shop.take_over()
        await job.add(Payment(order=order))

    shop.actor(body, retry_on={DBAPIError: TWICE}).send(7)
    shop.drain()
    assert (shop.payments(), shop.outcomes()) == ([], [("duplicate", "stale")])


def test_under_a_stricter_isolation_a_claim_that_was_rewritten_without_a_reply_is_still_the_run_s(
    strict_shop: Shop,
) -> None:
    shop = strict_shop

    async def body(job: Any, order: int) -> None:
        await job.call("execute", sa.select(Payment))
        if current_job().attempt == 1:
            claim = shop.claim()
            record, value = claim.record, claim.value
            assert shop.idempotency.claims.rewrite(claim, beside=not record.beside)
            claim.record, claim.value = record, value
        await job.add(Payment(order=order))

    shop.actor(body, retry_on={DBAPIError: TWICE}).send(7)
    shop.drain()
    assert (shop.payments(), shop.outcomes()[-1]) == ([7], ("succeeded", None))


def test_above_read_committed_a_job_longer_than_a_third_of_its_lease_says_how_it_can_succeed(
    postgresql_url: str, open_shop: Callable[..., Shop], caplog: pytest.LogCaptureFixture
) -> None:
    make_empty_tables(postgresql_url)
    engine = sa.create_engine(with_driver(postgresql_url), isolation_level="SERIALIZABLE")
    shop = open_shop(engine, lease=1_000)

    async def body(job: Any, order: int) -> None:
        await job.call("execute", sa.select(Payment))
        left = [shop.store.get(shop.claim().name).left]

        def renewed() -> bool:
            left.append(shop.store.get(shop.claim().name).left)
            return left[-1] > left[-2]

        # From one renewal to the next, a third of the lease passes.
        until(renewed)
        until(renewed)
        await job.add(Payment(order=order))

    shop.actor(body, retry_on={DBAPIError: TWICE}).send(7)
    shop.drain()
    assert (shop.payments(), shop.outcomes()) == ([], [("retried", None), ("dead", "exhausted")])
    lines = [record.getMessage() for record in caplog.records if "Idempotency(lease=…)" in record.getMessage()]
    assert len(lines) == 2


def test_an_interrupt_within_a_statement_gives_up_the_connection(
    postgresql_url: str, open_shop: Callable[..., Shop]
) -> None:
    make_empty_tables(postgresql_url)
    engine = sa.create_engine(with_driver(postgresql_url), pool_size=1, max_overflow=0)
    shop = open_shop(engine)
    backends = []

    async def body(job: Any, order: int) -> None:
        backends.append((await job.call("execute", sa.text("SELECT pg_backend_pid()"))).scalar())
        await job.add(Payment(order=order))
        shop.note.send(order)
        if len(backends) == 1:
            with suppress(TimeoutExceeded):
                for _ in range(1_000):
                    await job.call("execute", sa.text("SELECT pg_sleep(0.01)"))

    shop.actor(body, timeout=300, retry_on={TimeoutExceeded: TWICE}).send(7)
    shop.stage.run()
    assert shop.outcomes() == [("retried", None), ("succeeded", None)]
    assert (shop.payments(), shop.done) == ([7], [(7,)])
    assert len(set(backends)) == 2


@pytest.mark.parametrize("in_savepoint", [False, True])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_job_that_goes_on_after_the_server_has_rolled_its_transaction_back_fails(
    mariadb_url: str, open_shop: Callable[..., Shop], kind: str, in_savepoint: bool
) -> None:
    make_empty_tables(mariadb_url)
    sync = sa.create_engine(with_driver(mariadb_url))
    shop = open_shop(sync, None if kind == "sync" else async_engine(mariadb_url, poolclass=sa.NullPool))

    async def body(job: Any, order: int) -> None:
        await job.add(Payment(order=order))
        shop.note.send(order)
        with suppress(DBAPIError):
            if in_savepoint:
                await job.call("begin_nested")
            if current_job().attempt == 1:
                await deadlock(job)

    async def deadlock(job: Any) -> None:
        with deadlocking(sync) as statement:
            await job.call("execute", sa.text(statement(1)))
            await job.call("execute", sa.text(statement(2)))

    shop.actor(body, retry_on={DBAPIError: TWICE}).send(7)
    shop.drain()
    assert (shop.payments(), shop.done) == ([7], [(7,)])
    assert shop.outcomes() == [("retried", None), ("succeeded", None)]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_job_may_roll_back_after_a_deadlock_and_go_on(
    mariadb_url: str, open_shop: Callable[..., Shop], kind: str
) -> None:
    make_empty_tables(mariadb_url)
    sync = sa.create_engine(with_driver(mariadb_url))
    shop = open_shop(sync, None if kind == "sync" else async_engine(mariadb_url, poolclass=sa.NullPool))

    async def body(job: Any, order: int) -> None:
        with pytest.raises(DBAPIError), deadlocking(sync) as statement:
            await job.call("execute", sa.text(statement(1)))
            await job.call("execute", sa.text(statement(2)))
        await job.call("rollback")
        await job.add(Payment(order=order))

    shop.actor(body).send(7)
    shop.drain()
    assert (shop.payments(), shop.outcomes()) == ([7], [("succeeded", None)])


def test_a_commit_that_goes_on_after_its_connection_is_lost_is_waited_for(postgresql_url: str) -> None:
    make_empty_tables(postgresql_url)
    sync = sa.create_engine(with_driver(postgresql_url))
    Base.metadata.drop_all(sync)
    Base.metadata.create_all(sync)
    with sync.begin() as connection:
        connection.exec_driver_sql(
            "CREATE OR REPLACE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN PERFORM pg_sleep(3); RETURN NULL; END'"
        )
        connection.exec_driver_sql(
            "CREATE CONSTRAINT TRIGGER pauses AFTER INSERT ON payments DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION pause()"
        )
    with Proxy.before(postgresql_url) as proxy:
        engine = sa.create_engine(with_driver(proxy.url))
        shop = Shop(sync, engine)

        async def body(job: Any, order: int) -> None:
            await job.add(Payment(order=order))
            shop.note.send(order)

        shop.actor(body, retry_on={DBAPIError: ONCE}).send(7)
        lost = proxy.cut_when(b"COMMIT", after=True, grace=0.3)
        shop.drain()
        assert lost.wait()
        until(lambda: shop.payments() == [7])
        shop.drain()
        assert shop.outcomes()[-1] == ("duplicate", "completed")
        assert {outcome for outcome, _ in shop.outcomes()[:-1]} == {"deferred"}
        shop.close()
        engine.dispose()
    sync.dispose()
