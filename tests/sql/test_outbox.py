"""Sends in a transaction of SQLAlchemy, on SQLite and a StubBroker; on servers in tests/integration."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import weakref
from contextlib import contextmanager
from datetime import timedelta

import dramatiq
import pytest
import sqlalchemy as sa
from dramatiq import Message, group, pipeline
from dramatiq.broker import MessageProxy
from dramatiq.brokers.stub import StubBroker
from dramatiq.errors import QueueNotFound
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker
from sqlalchemy.pool import StaticPool

from dramatiq_policies import ConfigurationError, install
from dramatiq_policies.ops.dead_letters.commands import replay
from dramatiq_policies.sql import SqlOutbox, create_tables, metadata
from dramatiq_policies.sql.scopes import _wait_in_loop
from dramatiq_policies.testing import drain, stub
from dramatiq_policies.transactions.publisher import Ticket
from dramatiq_policies.transactions.scope import WrittenRows

from ..transactions.stub_shop import StubShop


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)


class Shop(StubShop):
    """An application with a SqlOutbox."""

    def __init__(self, engine, **options):
        self.engine = engine
        super().__init__(SqlOutbox(engine, **options))


def prepared(url, **options):
    engine = sa.create_engine(url, **options)
    create_tables(engine)
    Base.metadata.create_all(engine)
    return engine


@pytest.fixture
def engine(tmp_path):
    engine = prepared(f"sqlite:///{tmp_path}/shop.db")
    yield engine
    engine.dispose()


@pytest.fixture
def shop(engine):
    return Shop(engine)


@pytest.fixture
def async_engine(engine):
    return create_async_engine(f"sqlite+aiosqlite:///{engine.url.database}")


class Undo(Exception):
    pass


#: Events of a commit at which an application may send.
LISTENERS = ["before_commit", "before_flush", "after_flush", "after_flush_postexec", "after_insert"]


@contextmanager
def listening(session, name, listener):
    """Listen to an event of a sync session, or of its orders."""
    target = Order if name == "after_insert" else session
    sa.event.listen(target, name, listener)
    try:
        yield
    finally:
        sa.event.remove(target, name, listener)


def test_a_message_is_sent_when_its_transaction_commits(shop):
    with Session(shop.engine) as session, session.begin(), shop.outbox.within(session):
        session.add(Order(id=1))
        message = shop.confirm.send(1)
        assert shop.queued() == []
    assert shop.queued() == [(1,)]
    assert Message.decode(shop.broker.queues["mail"].queue[0]).message_id == message.message_id
    assert shop.pending() == 0


def test_a_message_of_a_transaction_that_is_rolled_back_is_never_sent(shop):
    with pytest.raises(Undo), Session(shop.engine) as session, session.begin(), shop.outbox.within(session):
        shop.confirm.send(1)
        raise Undo
    with Session(shop.engine) as session, shop.outbox.within(session):
        shop.confirm.send(2)
        session.rollback()
        session.commit()
    with Session(shop.engine) as session, shop.outbox.within(session):
        shop.confirm.send(3)
    assert (shop.queued(), shop.pending()) == ([], 0)


def test_a_session_commits_again_and_again(shop):
    with Session(shop.engine) as session, shop.outbox.within(session):
        for number in range(3):
            shop.confirm.send(number)
            session.commit()
            assert len(shop.queued()) == number + 1
    assert shop.queued() == [(0,), (1,), (2,)]


def test_the_commit_may_come_after_the_block(shop):
    with Session(shop.engine) as session:
        with shop.outbox.within(session):
            shop.confirm.send(1)
        assert shop.queued() == []
        session.commit()
    assert shop.queued() == [(1,)]


def test_a_savepoint_that_is_rolled_back_takes_its_messages_with_it(shop):
    with Session(shop.engine) as session, session.begin(), shop.outbox.within(session):
        shop.confirm.send("before")
        with pytest.raises(Undo), session.begin_nested():
            shop.confirm.send("undone")
            with session.begin_nested():
                shop.confirm.send("undone with the outer one")
            raise Undo
        with session.begin_nested():
            shop.confirm.send("kept")
            inner = session.begin_nested()
            shop.confirm.send("undone alone")
            inner.rollback()
        shop.confirm.send("after")
    assert shop.queued() == [("before",), ("kept",), ("after",)]


def test_a_connection_is_a_transaction_too(shop):
    with shop.engine.begin() as connection, shop.outbox.within(connection):
        shop.confirm.send(1)
        savepoint = connection.begin_nested()
        shop.confirm.send(2)
        savepoint.rollback()
        assert shop.queued() == []
    assert shop.queued() == [(1,)]
    with shop.engine.connect() as connection, shop.outbox.within(connection):
        shop.confirm.send(3)
        connection.rollback()
        shop.confirm.send(4)
        connection.commit()
        assert shop.queued() == [(1,), (4,)]
        shop.confirm.send(5)
        connection.commit()
    assert (shop.queued(), shop.pending()) == ([(1,), (4,), (5,)], 0)


def test_a_listener_of_the_session_sends_in_its_transaction(shop):
    with Session(shop.engine) as session, shop.outbox.within(session):
        for name in LISTENERS:
            with listening(session, name, lambda *_: shop.confirm.send(session.get_transaction() is not None)):
                session.add(Order())
                session.commit()
            assert shop.queued().pop() == (True,), name
            shop.broker.queues["mail"].queue.clear()
    assert shop.pending() == 0


def test_a_listener_that_sends_after_the_commit_gets_the_error_of_sqlalchemy(shop):
    session = Session(shop.engine)
    sending = listening(session, "after_commit", lambda *_: shop.confirm.send(1))
    with session, shop.outbox.within(session), sending:
        session.add(Order(id=1))
        with pytest.raises(sa.exc.InvalidRequestError, match="no further SQL"):
            session.commit()
    assert shop.queued() == []


def test_a_commit_that_fails_sends_nothing(shop):
    with shop.engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE child (parent INTEGER REFERENCES orders(id) DEFERRABLE INITIALLY DEFERRED)"
        )

    def fail(bind, session):
        with pytest.raises(sa.exc.IntegrityError), bind, shop.outbox.within(session):
            session.execute(sa.text("PRAGMA foreign_keys = ON"))
            session.commit()
            session.execute(sa.text("INSERT INTO child VALUES (404)"))
            shop.confirm.send(1)
            session.commit()

    connection = shop.engine.connect()
    fail(connection, connection)
    session = Session(shop.engine)
    fail(session, session)
    assert (shop.queued(), shop.pending()) == ([], 0)


def test_outside_of_a_block_a_message_is_sent_at_once(shop):
    with Session(shop.engine) as session, session.begin():
        shop.confirm.send(1)
        assert shop.queued() == [(1,)]
        with shop.outbox.within(session):
            pass
        shop.confirm.send(2)
        assert shop.queued() == [(1,), (2,)]


def test_an_actor_with_outbox_false_is_always_sent_at_once(shop):
    with Session(shop.engine) as session, session.begin(), shop.outbox.within(session):
        shop.at_once.send(1)
        assert shop.queued() == [(1,)]


def test_a_replay_sends_at_once_as_on_a_server(shop):
    message = shop.confirm.message(1)
    shop.broker.dead_letters_by_queue["mail"].append(MessageProxy(message))
    with pytest.raises(Undo), Session(shop.engine) as session, session.begin(), shop.outbox.within(session):
        assert replay(shop.broker).count == 1
        raise Undo
    assert shop.queued() == [(1,)]


def test_hooks_run_before_at_the_send_and_after_at_the_publication(shop):
    with Session(shop.engine) as session, session.begin(), shop.outbox.within(session):
        message = shop.confirm.send_with_options(args=(1,), delay=60_000)
        assert (shop.hooks.before, shop.hooks.after) == ([(message.message_id, 60_000)], [])
    assert shop.hooks.before == [(message.message_id, 60_000)]
    assert shop.hooks.after == [(message.message_id, 60_000, "known")]


def test_a_delay_counts_from_the_send(shop):
    with Session(shop.engine) as session, session.begin(), shop.outbox.within(session):
        message = shop.confirm.send_with_options(args=(1,), delay=60_000)
    (queued,) = [Message.decode(body) for body in shop.broker.queues["mail.DQ"].queue]
    assert queued == message
    assert queued.options["eta"] == pytest.approx(message.message_timestamp + 60_000, abs=5_000)


def test_groups_and_pipelines_go_through_the_outbox(shop):
    with Session(shop.engine) as session, session.begin(), shop.outbox.within(session):
        group([shop.confirm.message(1), shop.confirm.message(2)], broker=shop.broker).run()
        pipeline([shop.confirm.message(3), shop.confirm.message()], broker=shop.broker).run()
        shop.broker.enqueue(shop.confirm.message(4))
        assert shop.queued() == []
    assert shop.queued() == [(1,), (2,), (3,), (4,)]


def test_an_unknown_queue_is_refused_at_the_send(shop):
    with (
        Session(shop.engine) as session,
        shop.outbox.within(session),
        pytest.raises(QueueNotFound),
    ):
        shop.broker.enqueue(Message("nowhere", "confirm", (), {}, {}))


def test_the_argument_that_cannot_be_sent_is_named_at_the_send(shop):
    with (
        Session(shop.engine) as session,
        shop.outbox.within(session),
        pytest.raises(TypeError, match="can't be encoded"),
    ):
        shop.confirm.send(object())


def test_threads_and_copied_contexts_of_the_block_send_at_once(shop):
    with Session(shop.engine) as session, session.begin(), shop.outbox.within(session):
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(shop.confirm.send, "thread"))
        thread.start()
        thread.join()
        assert shop.queued() == [("thread",)]
        shop.confirm.send("here")
        assert shop.queued() == [("thread",)]
    context.run(shop.confirm.send, "later, in a copy of the block's context")
    assert len(shop.queued()) == 3


def test_blocks_nest_and_the_inner_one_counts(shop):
    with Session(shop.engine) as outer, shop.outbox.within(outer):
        shop.confirm.send("outer")
        outer.rollback()
        with Session(shop.engine) as inner, shop.outbox.within(inner):
            shop.confirm.send("inner")
            inner.commit()
        shop.confirm.send("outer again")
        outer.rollback()
    assert shop.queued() == [("inner",)]


def test_a_block_is_entered_once_at_a_time(shop):
    with Session(shop.engine) as session:
        block = shop.outbox.within(session)
        for _ in range(2):
            with block, pytest.raises(ConfigurationError, match="is open already"), block:
                pass


def test_two_brokers_have_an_outbox_each(engine):
    one, other = Shop(engine), Shop(engine, namespace="other")
    with Session(engine) as session, session.begin(), one.outbox.within(session):
        other.confirm.send("at once")
        assert other.queued() == [("at once",)]
        with other.outbox.within(session):
            one.confirm.send(1)
            other.confirm.send(2)
        assert one.queued() == []
    assert (one.queued(), other.queued()) == ([(1,)], [("at once",), (2,)])


def test_a_scoped_session_is_the_session_of_its_thread(shop):
    session = scoped_session(sessionmaker(shop.engine))
    with shop.outbox.within(session):
        shop.confirm.send(1)
        session.commit()
    session.remove()
    assert shop.queued() == [(1,)]


def test_many_messages_of_one_transaction(shop):
    with Session(shop.engine) as session, session.begin(), shop.outbox.within(session):
        for number in range(1_000):
            shop.confirm.send(number)
    assert shop.queued() == [(number,) for number in range(1_000)]
    assert shop.pending() == 0


def test_in_a_test_whose_connection_is_rolled_back_the_commit_of_the_session_counts(shop):

    @sa.event.listens_for(shop.engine, "begin")
    def begin(connection):
        # Python's sqlite3 begins no transaction before a savepoint, and would commit at its release.
        connection.exec_driver_sql("BEGIN")

    with shop.engine.connect() as connection:
        outer = connection.begin()
        for mode in ("create_savepoint", "rollback_only", "conditional_savepoint"):
            with Session(connection, join_transaction_mode=mode) as session, shop.outbox.within(session):
                shop.confirm.send(mode)
                session.commit()
        assert shop.queued() == [("create_savepoint",), ("rollback_only",), ("conditional_savepoint",)]
        with Session(connection, join_transaction_mode="create_savepoint") as session, shop.outbox.within(session):
            shop.confirm.send("undone")
            session.rollback()
        assert len(shop.queued()) == 3
        outer.rollback()
    assert shop.pending() == 0


def test_in_memory_the_connection_of_the_engine_is_used():
    shop = Shop(prepared("sqlite://", poolclass=StaticPool))
    with Session(shop.engine) as session, session.begin(), shop.outbox.within(session):
        shop.confirm.send(1)
    assert (shop.queued(), shop.pending()) == ([(1,)], 0)


def test_stub_keeps_the_database_and_takes_a_namespace_of_its_own(shop):
    with stub(shop.broker) as broker:
        with Session(shop.engine) as session, session.begin(), shop.outbox.within(session):
            shop.confirm.send_with_options(args=(1,), delay=60_000)
            assert shop.done == []
        drain(broker)
        assert shop.done == [(1,)]
        with pytest.raises(Undo), Session(shop.engine) as session, session.begin(), shop.outbox.within(session):
            shop.confirm.send(2)
            raise Undo
        drain(broker)
    assert shop.done == [(1,)]
    assert shop.queued() == []


def test_a_job_sends_in_a_transaction_of_its_own(shop):
    def order(number):
        with Session(shop.engine) as session, session.begin(), shop.outbox.within(session):
            session.add(Order(id=number))
            shop.confirm.send(number)

    actor = dramatiq.actor(order, broker=shop.broker, queue_name="mail", retry_on=(), discard_on=())
    actor.send(1)
    drain(shop.broker)
    assert shop.done == [(1,)]


def test_sessions_are_not_kept(shop):
    session = Session(shop.engine)
    with shop.outbox.within(session):
        shop.confirm.send(1)
        session.commit()
    session.close()
    seen = weakref.ref(session)
    del session
    gc.collect()
    assert seen() is None


def test_connections_are_not_kept(shop):
    connection = shop.engine.connect()
    with shop.outbox.within(connection):
        shop.confirm.send(1)
        connection.commit()
        shop.confirm.send(2)
    connection.close()
    seen = weakref.ref(connection)
    gc.disable()
    try:
        del connection
        assert seen() is None
    finally:
        gc.enable()
    assert shop.queued() == [(1,)]


# Async sessions.


def test_an_async_session_sends_at_its_commit(shop, async_engine):
    async def order():
        async with AsyncSession(async_engine) as session:
            async with session.begin(), shop.outbox.within(session):
                session.add(Order(id=1))
                message = shop.confirm.send(1)
                # Objects that are taken out of the session leave the message where it is.
                await session.flush()
                session.expunge_all()
                assert shop.queued() == []
            assert shop.queued() == [(1,)]
            async with shop.outbox.within(session):
                shop.confirm.send(2)
                await session.rollback()
                shop.confirm.send(3)
                await session.commit()
        await async_engine.dispose()
        return message

    message = asyncio.run(order())
    assert shop.queued() == [(1,), (3,)]
    assert Message.decode(shop.broker.queues["mail"].queue[0]).message_id == message.message_id


def test_savepoints_of_an_async_session(shop, async_engine):
    async def order():
        async with AsyncSession(async_engine) as session, session.begin(), shop.outbox.within(session):
            shop.confirm.send("before")
            with pytest.raises(Undo):
                async with session.begin_nested():
                    shop.confirm.send("undone")
                    async with session.begin_nested():
                        shop.confirm.send("undone with the outer one")
                    raise Undo
            async with session.begin_nested():
                await session.execute(sa.select(Order))
                shop.confirm.send("kept")
                inner = await session.begin_nested()
                shop.confirm.send("undone alone")
                await inner.rollback()
            shop.confirm.send("after")
        await async_engine.dispose()

    asyncio.run(order())
    assert shop.queued() == [("before",), ("kept",), ("after",)]


def test_a_savepoint_that_is_still_open_is_committed_with_its_async_session(shop, async_engine):
    async def order():
        async with AsyncSession(async_engine) as session, shop.outbox.within(session):
            shop.confirm.send(1)
            await session.begin_nested()
            shop.confirm.send(2)
            await session.begin_nested()
            shop.confirm.send(3)
            await session.commit()
            async with session.begin():
                shop.confirm.send(4)
                await session.begin_nested()
                shop.confirm.send(5)
                await session.begin_nested()
                shop.confirm.send(6)
        await async_engine.dispose()

    asyncio.run(order())
    assert shop.queued() == [(number,) for number in range(1, 7)]
    assert shop.pending() == 0


def test_after_an_error_at_the_commit_of_an_async_session_a_second_commit_has_all_messages(
    shop, async_engine, monkeypatch
):
    insert, fails = shop.outbox.insert, [False, True]

    def insert_or_fail(*args):
        if fails and fails.pop(0):
            raise sa.exc.OperationalError("INSERT", {}, Exception("database is locked"))
        insert(*args)

    monkeypatch.setattr(shop.outbox, "insert", insert_or_fail)

    async def order():
        async with AsyncSession(async_engine) as session, shop.outbox.within(session):
            session.add(Order(id=1))
            for number in range(3):
                shop.confirm.send(number)
            with pytest.raises(sa.exc.OperationalError):
                await session.commit()
            await session.commit()
        await async_engine.dispose()

    asyncio.run(order())
    assert shop.queued() == [(0,), (1,), (2,)]


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_an_async_session_on_a_connection_sends_with_the_transaction_of_the_connection(shop, async_engine, end):
    async def order():
        async with async_engine.connect() as connection:
            await connection.begin()
            async with AsyncSession(connection) as session, shop.outbox.within(session):
                session.add(Order(id=1))
                shop.confirm.send(1)
                await session.flush()
                undone = await session.begin_nested()
                shop.confirm.send("undone")
                await undone.rollback()
            async with (
                AsyncSession(connection, join_transaction_mode="create_savepoint") as session,
                shop.outbox.within(session),
            ):
                shop.confirm.send("undone with its session")
            assert shop.queued() == []
            await getattr(connection, end)()
        await async_engine.dispose()

    asyncio.run(order())
    assert shop.queued() == ([(1,)] if end == "commit" else [])
    assert shop.pending() == 0


def test_a_session_without_autobegin_begins_nothing_by_a_send(shop, async_engine):
    async def order():
        async with AsyncSession(async_engine, autobegin=False) as session, shop.outbox.within(session):
            with pytest.raises(sa.exc.InvalidRequestError, match="Autobegin is disabled"):
                shop.confirm.send(1)
            async with session.begin():
                shop.confirm.send(2)
        await async_engine.dispose()

    asyncio.run(order())
    with Session(shop.engine, autobegin=False) as session, shop.outbox.within(session):
        with pytest.raises(sa.exc.InvalidRequestError, match="Autobegin is disabled"):
            shop.confirm.send(3)
        with session.begin():
            shop.confirm.send(4)
    assert shop.queued() == [(2,), (4,)]


def test_an_async_session_runs_sync_code(shop, async_engine):
    def sync(session):
        shop.confirm.send(1)
        savepoint = session.begin_nested()
        shop.confirm.send(2)
        savepoint.rollback()

    async def order():
        async with AsyncSession(async_engine) as session, session.begin(), shop.outbox.within(session):
            await session.run_sync(sync)
        await async_engine.dispose()

    asyncio.run(order())
    assert shop.queued() == [(1,)]


@pytest.mark.parametrize("name", LISTENERS)
@pytest.mark.parametrize("sent_before", [False, True])
def test_a_listener_of_an_async_session_sends_in_its_transaction(shop, async_engine, name, sent_before):
    expected = [("before",)] * sent_before + [("in the listener",)]

    async def order():
        async with AsyncSession(async_engine) as session, shop.outbox.within(session):
            if sent_before:
                shop.confirm.send("before")
            with listening(session.sync_session, name, lambda *_: shop.confirm.send("in the listener")):
                session.add(Order())
                await session.commit()
            assert shop.queued() == expected
            with listening(session.sync_session, name, lambda *_: shop.confirm.send("undone")):
                session.add(Order())
                await session.flush()
                await session.rollback()
        await async_engine.dispose()

    asyncio.run(order())
    assert shop.queued() == expected
    assert shop.pending() == 0


def test_a_listener_that_sends_after_the_commit_of_an_async_session_gets_the_error_of_sqlalchemy(shop, async_engine):
    async def order():
        async with AsyncSession(async_engine) as session, shop.outbox.within(session):
            with listening(session.sync_session, "after_commit", lambda *_: shop.confirm.send(1)):
                session.add(Order(id=1))
                with pytest.raises(sa.exc.InvalidRequestError, match="no further SQL"):
                    await session.commit()
        await async_engine.dispose()

    asyncio.run(order())
    assert shop.queued() == []


def test_messages_of_an_async_session_and_of_its_sync_code_keep_their_order(shop, async_engine):
    async def order():
        async with AsyncSession(async_engine) as session, session.begin(), shop.outbox.within(session):
            shop.confirm.send(1)
            await session.run_sync(lambda _: shop.confirm.send(2))
            shop.confirm.send(3)
            with pytest.raises(Undo):
                async with session.begin_nested():
                    shop.confirm.send("undone")
                    await session.run_sync(lambda _: shop.confirm.send("undone"))
                    raise Undo
            async with session.begin_nested():
                await session.run_sync(lambda _: shop.confirm.send(4))
            shop.confirm.send(5)
        await async_engine.dispose()

    asyncio.run(order())
    assert sorted(shop.queued()) == [(1,), (2,), (3,), (4,), (5,)]
    assert shop.queued()[:2] == [(1,), (2,)]


def test_tasks_that_write_at_the_same_time_send_at_their_commits(shop, async_engine):
    async def order(number):
        async with AsyncSession(async_engine) as session, session.begin(), shop.outbox.within(session):
            session.add(Order(id=number))
            await session.flush()
            shop.confirm.send(number)
            await asyncio.sleep(0)

    async def orders():
        await asyncio.gather(*(order(number) for number in range(6)))
        await async_engine.dispose()

    asyncio.run(orders())
    assert sorted(shop.queued()) == [(number,) for number in range(6)]


def test_tasks_that_the_block_starts_send_at_once(shop, async_engine):
    async def send(number):
        shop.confirm.send(number)

    async def order():
        async with AsyncSession(async_engine) as session, session.begin(), shop.outbox.within(session):
            await asyncio.create_task(send("task"))
            await asyncio.to_thread(shop.confirm.send, "thread")
            assert shop.queued() == [("task",), ("thread",)]
            await send("here")
            assert len(shop.queued()) == 2
        await async_engine.dispose()

    asyncio.run(order())
    assert shop.queued() == [("task",), ("thread",), ("here",)]


def test_after_the_block_of_an_async_session_a_message_is_sent_at_once(shop, async_engine):
    async def order():
        async with AsyncSession(async_engine) as session, session.begin():
            async with shop.outbox.within(session):
                shop.confirm.send(1)
            shop.confirm.send(2)
            assert shop.queued() == [(2,)]
        await async_engine.dispose()

    asyncio.run(order())
    assert shop.queued() == [(2,), (1,)]


def test_the_outbox_may_have_the_async_engine(engine, async_engine):
    shop = Shop(async_engine)

    async def order():
        async with AsyncSession(async_engine) as session, session.begin(), shop.outbox.within(session):
            shop.confirm.send(1)
        await async_engine.dispose()

    asyncio.run(order())
    assert shop.queued() == [(1,)]
    assert Shop(engine).pending() == 0
    shop.outbox.database.close()


def test_an_async_scoped_session_is_the_session_of_its_task(shop, async_engine):
    async def order():
        session = async_scoped_session(async_sessionmaker(async_engine), asyncio.current_task)
        async with shop.outbox.within(session):
            shop.confirm.send(1)
            await session.commit()
        await session.remove()
        await async_engine.dispose()

    asyncio.run(order())
    assert shop.queued() == [(1,)]


@pytest.mark.parametrize("loop_ended", [False, True])
def test_a_publication_that_ends_after_its_async_caller_gave_up_logs_nothing(caplog, loop_ended):
    ticket = Ticket(WrittenRows())

    async def gives_up():
        await _wait_in_loop(ticket, 0)
        if not loop_ended:
            await asyncio.to_thread(ticket.done)

    asyncio.run(gives_up())
    if loop_ended:
        ticket.done()
    assert ticket.is_done
    assert caplog.records == []


# Refusals.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"wait": -1}, "SqlOutbox: wait: expected a timedelta or milliseconds, at least 0"),
        ({"wait": "1 s"}, "SqlOutbox: wait: expected a timedelta or milliseconds"),
        ({"lease": 0}, "SqlOutbox: lease: expected a timedelta or milliseconds, at least 1000"),
        (
            {"lease": timedelta(milliseconds=999)},
            "SqlOutbox: lease: expected a timedelta or milliseconds, at least 1000",
        ),
        ({"relay": "yes"}, "SqlOutbox: relay: expected True or False, got 'yes'"),
        ({"namespace": None}, "SqlOutbox: namespace: expected a str of at most 64 characters, got None"),
        ({"namespace": "x" * 65}, "SqlOutbox: namespace: expected a str of at most 64 characters"),
    ],
)
def test_a_wrong_argument_is_refused(engine, options, expected):
    with pytest.raises(ConfigurationError, match=f"^{expected}"):
        SqlOutbox(engine, **options)


def test_an_object_that_is_no_engine_is_refused():
    with pytest.raises(ConfigurationError, match="SqlOutbox: engine: expected an Engine or AsyncEngine of SQLAlchemy"):
        SqlOutbox("sqlite://")


def test_install_takes_an_outbox_and_nothing_else(engine):
    with pytest.raises(ConfigurationError, match="outbox: expected a SqlOutbox, a DjangoOutbox or None, got a str"):
        install(StubBroker(), outbox="outbox")
    outbox = SqlOutbox(engine)
    install(StubBroker(), outbox=outbox)
    with pytest.raises(ConfigurationError, match="is on another broker already"):
        install(StubBroker(), outbox=outbox)


@pytest.mark.parametrize("value", [None, "no", 0])
def test_the_option_of_an_actor_is_checked_at_its_declaration(shop, value):
    with pytest.raises(ConfigurationError, match=r"actor 'wrong': outbox: expected True or False"):
        dramatiq.actor(print, broker=shop.broker, actor_name="wrong", outbox=value)


@pytest.mark.parametrize("wrong", [None, "session", sessionmaker()])
def test_an_object_that_is_no_session_is_refused(shop, wrong):
    expected = r"SqlOutbox.within\(\): session: expected a Session, an AsyncSession or a Connection"
    with pytest.raises(ConfigurationError, match=expected):
        shop.outbox.within(wrong)


def test_an_outbox_on_no_broker_has_no_blocks(engine):
    with Session(engine) as session, pytest.raises(ConfigurationError, match=r"is on no broker. Call install"):
        SqlOutbox(engine).within(session)


def test_a_session_of_another_database_is_refused(shop, tmp_path):
    other = prepared(f"sqlite:///{tmp_path}/other.db")
    with Session(other) as session, pytest.raises(ConfigurationError, match=r"other\.db\) than the outbox .*shop\.db"):
        shop.outbox.within(session)
    with other.connect() as connection, pytest.raises(ConfigurationError, match="is on another database"):
        shop.outbox.within(connection)
    with Session(prepared("sqlite://")) as session, pytest.raises(ConfigurationError, match="is on another database"):
        shop.outbox.within(session)


def test_another_engine_of_the_same_database_will_do(shop):
    other = sa.create_engine(shop.engine.url)
    with Session(other) as session, session.begin(), shop.outbox.within(session):
        shop.confirm.send(1)
    with Session(shop.engine.execution_options(logging_token="x")) as session, shop.outbox.within(session):
        shop.confirm.send(2)
        session.commit()
    other.dispose()
    assert shop.queued() == [(1,), (2,)]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("postgresql+psycopg://u@localhost/shop", "postgresql+asyncpg://v:secret@127.0.0.1:5432/shop", True),
        ("postgresql+psycopg://localhost/shop", "postgresql+psycopg://localhost/other", False),
        ("postgresql+psycopg://db1/shop", "postgresql+psycopg://db2/shop", False),
        ("postgresql+psycopg://localhost:5433/shop", "postgresql+psycopg://localhost/shop", False),
        ("postgresql+psycopg:///shop?host=/run/pg", "postgresql+psycopg:///shop?host=/run/pg", True),
        ("mysql+pymysql://localhost/shop", "mariadb+pymysql://localhost:3306/shop", True),
        ("mysql+pymysql://localhost/shop", "postgresql+psycopg://localhost/shop", False),
    ],
)
def test_databases_differ_by_kind_host_port_and_name(one, other, same):
    def engine(url):
        # Nothing connects here.
        return create_async_engine(url) if "asyncpg" in url else sa.create_engine(url)

    outbox = SqlOutbox(engine(one))
    install(StubBroker(), outbox=outbox)
    session = (AsyncSession if "asyncpg" in other else Session)(engine(other))
    if same:
        outbox.within(session)
    else:
        with pytest.raises(ConfigurationError, match="is on another database") as refused:
            outbox.within(session)
        assert "secret" not in str(refused.value)


def test_a_session_of_several_engines_writes_where_the_outbox_is(shop, tmp_path):
    other = prepared(f"sqlite:///{tmp_path}/other.db")
    with Session(binds={Order: other}) as session, pytest.raises(ConfigurationError, match="Bind it: Session"):
        shop.outbox.within(session)
    table = metadata.tables["dramatiq_policies_outbox"]
    with Session(binds={Order: other, table: shop.engine}) as session, shop.outbox.within(session):
        session.add(Order(id=1))
        shop.confirm.send(1)
        session.commit()
    assert shop.queued() == [(1,)]


def test_without_transactions_there_is_no_block(shop):
    expected = "AUTOCOMMIT"
    connection = shop.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    with connection, pytest.raises(ConfigurationError, match=expected):
        shop.outbox.within(connection)
    for engine in (
        shop.engine.execution_options(isolation_level="AUTOCOMMIT"),
        sa.create_engine(shop.engine.url, isolation_level="AUTOCOMMIT"),
    ):
        with Session(engine) as session, pytest.raises(ConfigurationError, match=expected):
            shop.outbox.within(session)
    with Session(shop.engine) as session, shop.outbox.within(session):
        session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        with pytest.raises(ConfigurationError, match=expected):
            shop.confirm.send(1)
    assert shop.queued() == []


def test_a_missing_table_is_logged_with_advice(tmp_path):
    shop = Shop(sa.create_engine(f"sqlite:///{tmp_path}/empty.db"))
    expected = r"The outbox has no table: call dramatiq_policies.sql.create_tables\(engine\)"
    with (
        Session(shop.engine) as session,
        shop.outbox.within(session),
        pytest.raises(ConfigurationError, match=expected),
    ):
        shop.confirm.send(1)
