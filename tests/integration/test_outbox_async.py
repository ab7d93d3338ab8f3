"""Sends in a transaction of an AsyncSession, with the async driver of each database."""

from __future__ import annotations

import asyncio
import time

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from tests.proxy import Proxy

from .databases import async_engine
from .places import until
from .shops import Shop

pytestmark = pytest.mark.usefixtures("quick_restarts")


class Undo(Exception):
    pass


@pytest.fixture
def shop(place, database_url):
    shop = Shop(place, async_engine(database_url))
    yield shop
    shop.outbox.database.close()


def run(shop, coroutine):
    async def main():
        try:
            return await coroutine
        finally:
            await shop.engine.dispose()

    return asyncio.run(main())


def test_a_commit_sends_and_a_rollback_does_not(shop):
    async def orders():
        async with AsyncSession(shop.engine) as session, session.begin(), shop.outbox.within(session):
            message = shop.confirm.send(1)
            assert shop.place.ready() == 0
        with pytest.raises(Undo):
            async with AsyncSession(shop.engine) as session, session.begin(), shop.outbox.within(session):
                shop.confirm.send(2)
                raise Undo
        async with AsyncSession(shop.engine) as session, session.begin(), shop.outbox.within(session):
            with pytest.raises(Undo):
                async with session.begin_nested():
                    shop.confirm.send(3)
                    raise Undo
            async with session.begin_nested():
                shop.confirm.send(4)
            shop.confirm.send_with_options(args=(5,), delay=60_000)
        return message

    message = run(shop, orders())
    assert shop.pending() == 0
    found = shop.messages()
    assert sorted(one.args[0] for one in found) == [1, 4, 5]
    assert message in found


def test_many_tasks_send_at_the_same_time(shop):
    async def order(number):
        async with AsyncSession(shop.engine) as session, session.begin(), shop.outbox.within(session):
            shop.confirm.send(number)
            await asyncio.sleep(0)
            shop.confirm.send(number + 100)

    async def orders():
        await asyncio.gather(*[order(number) for number in range(20)])

    run(shop, orders())
    until(lambda: shop.pending() == 0)
    assert shop.left() == [*range(20), *range(100, 120)]


def test_sync_code_of_an_async_session_sends_too(shop):
    def sync(session):
        with shop.outbox.within(session):
            shop.confirm.send(1)
            savepoint = session.begin_nested()
            shop.confirm.send(2)
            savepoint.rollback()
            session.commit()

    async def orders():
        async with AsyncSession(shop.engine) as session:
            await session.run_sync(sync)

    run(shop, orders())
    assert shop.pending() == 0
    assert shop.left() == [1]


def test_other_tasks_go_on_while_a_commit_waits_for_a_frozen_broker(place, database_url):
    with Proxy.before(place.url) as proxy:
        shop = Shop(place, async_engine(database_url), proxy.url, wait=1_000)
        ticks = []

        async def tick():
            while True:
                ticks.append(time.monotonic())
                await asyncio.sleep(0.02)

        async def order(number):
            async with AsyncSession(shop.engine) as session:
                async with shop.outbox.within(session):
                    shop.confirm.send(number)
                before, began = len(ticks), time.monotonic()
                await session.commit()
                return len(ticks) - before, time.monotonic() - began

        async def orders():
            ticking = asyncio.create_task(tick())
            await order(0)
            proxy.stall()
            told = await order(1)
            at_once = await order(2)
            proxy.resume()
            ticking.cancel()
            return told, at_once

        (ticked, took), _ = run(shop, orders())
        assert 1 <= took < 9
        assert ticked >= 10
        until(lambda: shop.pending() == 0)
        assert sorted(set(shop.left())) == [0, 1, 2]
        shop.outbox.database.close()


def test_a_commit_that_is_cancelled_while_it_waits_has_committed(place, database_url):
    with Proxy.before(place.url) as proxy:
        shop = Shop(place, async_engine(database_url), proxy.url, wait=30_000)

        async def order(number):
            async with AsyncSession(shop.engine) as session, session.begin(), shop.outbox.within(session):
                shop.confirm.send(number)

        async def orders():
            await order(0)
            proxy.stall()
            task = asyncio.create_task(order(1))
            await asyncio.to_thread(until, shop.pending)
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            proxy.resume()

        run(shop, orders())
        until(lambda: shop.pending() == 0)
        assert sorted(set(shop.left())) == [0, 1]
        shop.outbox.database.close()


@pytest.mark.parametrize("kind", ["sync engine", "async engine"])
def test_the_outbox_and_the_session_may_have_different_drivers(place, database_url, database_engine, kind):
    sessions = async_engine(database_url)
    shop = Shop(place, database_engine if kind == "sync engine" else sessions)

    async def order():
        async with AsyncSession(sessions) as session, session.begin(), shop.outbox.within(session):
            shop.confirm.send(1)

    shop.engine = sessions
    run(shop, order())
    shop.engine = database_engine
    with shop.order():
        shop.confirm.send(2)
    assert shop.pending() == 0
    assert shop.left() == [1, 2]
    shop.outbox.database.close()


def test_an_async_session_on_a_connection_sends_with_the_connection_and_raises_the_error_of_the_application(shop):
    async def order(number, statement, *, commit):
        async with shop.engine.connect() as connection:
            await connection.begin()
            async with AsyncSession(connection) as session, shop.outbox.within(session):
                shop.confirm.send(number)
                await session.execute(text(statement))
            if commit:
                await connection.commit()

    async def orders():
        await order(1, "SELECT 1", commit=True)
        await order(2, "SELECT 1", commit=False)
        with pytest.raises(DBAPIError, match="no_such_table"):
            await order(3, "SELECT 1 FROM no_such_table", commit=True)

    run(shop, orders())
    assert (shop.left(), shop.pending()) == ([1], 0)
