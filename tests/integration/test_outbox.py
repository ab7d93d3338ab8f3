"""Sends in a transaction, on every database and every broker."""

from __future__ import annotations

import threading
import time

import pytest
import sqlalchemy as sa
from dramatiq import group, pipeline
from dramatiq.middleware import GroupCallbacks
from dramatiq.rate_limits.backends import StubBackend
from sqlalchemy.orm import Session

from tests.proxy import Proxy

from .databases import make_empty_tables, with_driver
from .places import until
from .shops import Shop

pytestmark = pytest.mark.usefixtures("quick_restarts")


class Undo(Exception):
    pass


@pytest.fixture
def shop(place, database_engine):
    return Shop(place, database_engine)


def test_a_commit_sends_and_a_rollback_does_not(shop):
    with shop.order():
        message = shop.confirm.send(1)
        assert shop.place.ready() == 0
    with pytest.raises(Undo), shop.order():
        shop.confirm.send(2)
        raise Undo
    with shop.order() as session:
        with pytest.raises(Undo), session.begin_nested():
            shop.confirm.send(3)
            raise Undo
        with session.begin_nested():
            shop.confirm.send(4)
    assert shop.pending() == 0
    found = shop.messages()
    assert sorted(one.args[0] for one in found) == [1, 4]
    assert message in found


def test_a_connection_sends_after_its_commit(shop):
    with shop.engine.begin() as connection, shop.outbox.within(connection):
        shop.confirm.send(1)
        savepoint = connection.begin_nested()
        shop.confirm.send(2)
        savepoint.rollback()
        assert shop.place.ready() == 0
    assert shop.pending() == 0
    assert shop.left() == [1]


def test_a_transaction_in_two_phases_sends_after_its_commit(place, mariadb_url):
    # PostgreSQL takes such transactions only if configured to, SQLite never.
    make_empty_tables(mariadb_url)
    engine = sa.create_engine(with_driver(mariadb_url))
    shop = Shop(place, engine)
    with engine.connect() as connection, shop.outbox.within(connection):
        for number, end in [(1, "rollback"), (2, "commit")]:
            transaction = connection.begin_twophase()
            shop.confirm.send(number)
            transaction.prepare()
            assert shop.place.ready() == 0
            getattr(transaction, end)()
    with Session(engine, twophase=True) as session, session.begin(), shop.outbox.within(session):
        shop.confirm.send(3)
    assert shop.pending() == 0
    assert shop.left() == [2, 3]
    engine.dispose()


def test_a_worker_runs_the_messages_of_a_transaction_delayed_ones_too(shop):
    with shop.order():
        shop.confirm.send_with_options(args=(1,), delay=300)
        shop.confirm.send(2)
    with shop.working():
        until(lambda: shop.done == [2, 1], describe=lambda: shop.done)


def test_groups_and_pipelines(shop):
    shop.broker.add_middleware(GroupCallbacks(StubBackend()))
    with shop.order():
        whole = group([shop.confirm.message(1), shop.confirm.message(2)], broker=shop.broker)
        whole.add_completion_callback(shop.confirm.message(3))
        whole.run()
        pipeline([shop.confirm.message(4), shop.confirm.message(5)], broker=shop.broker).run()
        assert shop.place.ready() == 0
    assert shop.left() == [1, 2, 4]


def test_many_rows_of_one_transaction(shop):
    with shop.order():
        for number in range(500):
            shop.confirm.send(number)
    assert shop.pending() == 0
    assert shop.left() == list(range(500))


def test_transactions_of_many_threads(shop):
    def orders(start):
        for number in range(start, start + 20):
            with shop.order():
                shop.confirm.send(number)

    threads = [threading.Thread(target=orders, args=(start,)) for start in range(0, 160, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: shop.pending() == 0)
    assert shop.left() == list(range(160))


def test_in_a_transaction_that_a_connection_holds_the_commit_of_the_connection_counts(shop):
    if shop.engine.dialect.name == "sqlite":
        # Python's sqlite3 begins no transaction before a savepoint, and would commit at its release.
        sa.event.listen(shop.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    for commits in (False, True):
        with shop.engine.connect() as connection:
            outer = connection.begin()
            for number in (1, 2):
                with Session(connection, join_transaction_mode="create_savepoint") as session:
                    with shop.outbox.within(session):
                        shop.confirm.send(number)
                    session.commit()
            assert shop.place.ready() == 0
            (outer.commit if commits else outer.rollback)()
    assert shop.pending() == 0
    assert shop.left() == [1, 2]


def test_with_wait_0_the_relay_sends_all(place, database_engine):
    shop = Shop(place, database_engine, wait=0)
    with shop.order():
        shop.confirm.send(1)
    assert (shop.place.ready(), shop.pending()) == (0, 1)
    with shop.relaying():
        until(lambda: shop.pending() == 0)
    assert shop.left() == [1]


def relays():
    return [thread for thread in threading.enumerate() if thread.name == "dramatiq-policies-outbox"]


def test_a_worker_relays_the_rows_that_a_dead_process_has_left(place, database_engine):
    shop = Shop(place, database_engine, wait=0)
    with shop.order():
        shop.confirm.send(1)
    with shop.working():
        assert len(relays()) == 1
        until(lambda: shop.done == [1])
    assert relays() == []
    assert shop.pending() == 0


def test_without_a_relay_a_worker_has_no_thread(place, database_engine):
    with Shop(place, database_engine, relay=False).working():
        assert relays() == []


@pytest.fixture
def proxy(place):
    with Proxy.before(place.url) as proxy:
        yield proxy


def test_commits_go_on_while_the_broker_is_down_and_the_relay_sends_later(place, database_engine, proxy):
    shop = Shop(place, database_engine, proxy.url)
    proxy.refuse()
    proxy.cut()
    began = time.monotonic()
    with shop.order():
        message = shop.confirm.send(1)
    assert time.monotonic() - began < 5
    assert shop.place.ready() == 0
    with shop.relaying():
        until(lambda: shop.rows()[0].failures >= 1)
        assert shop.rows()[0].error
        proxy.accept()
        until(lambda: shop.pending() == 0, 15)
    (found,) = shop.messages()
    assert found.message_id == message.message_id


def test_a_commit_waits_for_a_frozen_broker_no_longer_than_its_limit(place, database_engine, proxy):
    shop = Shop(place, database_engine, proxy.url, wait=300)
    with shop.order():
        shop.confirm.send(0)
    proxy.stall()
    first = time.monotonic()
    for number in range(1, 6):
        began = time.monotonic()
        with shop.order():
            shop.confirm.send(number)
        assert time.monotonic() - began < 8
    # Only the first one waits: the others see that the publisher is stuck.
    assert time.monotonic() - first < 8
    proxy.resume()
    until(lambda: shop.pending() == 0)
    assert sorted(set(shop.left())) == [0, 1, 2, 3, 4, 5]
