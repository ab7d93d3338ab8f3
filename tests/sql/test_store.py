"""SqlStore without a server; tests/integration has the contract and the servers."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time

import dramatiq
import pytest
import sqlalchemy as sa
from dramatiq.brokers.stub import StubBroker
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import StaticPool

from dramatiq_policies import ConfigurationError, Idempotency, install
from dramatiq_policies.errors import MissingTable
from dramatiq_policies.idempotency.services import service_scope_of
from dramatiq_policies.sql import SqlStore, create_tables, metadata
from dramatiq_policies.sql.database import SqlDatabase
from dramatiq_policies.stores import Entry, IdempotencyStore
from dramatiq_policies.testing import IdempotencyStoreContract, drain, stub
from dramatiq_policies.transactions.database import KEYS

LONG = 60_000


@pytest.fixture
def engine(tmp_path):
    engine = sa.create_engine(f"sqlite:///{tmp_path}/keys.db")
    create_tables(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def store(engine):
    store = SqlStore(engine)
    yield store
    store.database.close()


def count(engine):
    with engine.connect() as connection:
        return connection.scalar(sa.text(f"SELECT COUNT(*) FROM {KEYS}"))


# Declaration.


@pytest.mark.parametrize("wrong", [None, "sqlite://", metadata])
def test_an_object_that_is_no_engine_is_refused(wrong):
    with pytest.raises(ConfigurationError, match="SqlStore: engine: expected an Engine or AsyncEngine"):
        SqlStore(wrong)


@pytest.mark.parametrize("wrong", ["", None, 7, b"shop"])
def test_a_namespace_is_a_text_that_is_not_empty(engine, wrong):
    with pytest.raises(ConfigurationError, match="SqlStore: namespace: expected a non-empty str"):
        SqlStore(engine, namespace=wrong)


def test_nothing_connects_at_construction():
    before = {*threading.enumerate()}
    store = SqlStore(sa.create_engine("postgresql+psycopg://user@host.invalid/test"))
    assert isinstance(store, IdempotencyStore)
    # Threads of other tests may end meanwhile.
    assert {*threading.enumerate()} - before == set()


def test_a_namespace_of_the_user_separates_services_and_the_default_leaves_it_to_the_broker(engine):
    broker = StubBroker()
    assert SqlStore(engine).is_namespaced is False
    assert SqlStore(engine, namespace="idem").is_namespaced is True
    assert service_scope_of(broker, SqlStore(engine, namespace="shop")) is None


def test_two_namespaces_share_no_key(engine, store):
    other = SqlStore(engine, namespace="other")
    assert store.swap("k", None, b"one", LONG) is None
    assert other.swap("k", None, b"two", LONG) is None
    assert (store.get("k").value, other.get("k").value) == (b"one", b"two")
    other.database.close()


def test_the_database_sees_no_key(engine, store):
    store.put("charge\0order:42", b"one", LONG)
    with engine.connect() as connection:
        ((name,),) = connection.execute(sa.text(f"SELECT name FROM {KEYS}"))
    assert len(name) == 64
    assert "42" not in name or int(name, 16)


# The table.


def test_a_missing_table_is_an_error_that_says_how_to_make_it(tmp_path):
    store = SqlStore(sa.create_engine(f"sqlite:///{tmp_path}/empty.db"))
    with pytest.raises(MissingTable, match=rf"no table {KEYS}: call dramatiq_policies\.sql\.create_tables\(engine\)"):
        store.swap("k", None, b"one", LONG)
    store.database.close()


def test_a_store_may_be_made_before_its_table(tmp_path):
    engine = sa.create_engine(f"sqlite:///{tmp_path}/late.db")
    store = SqlStore(engine)
    with pytest.raises(MissingTable):
        store.get("k")
    create_tables(engine)
    assert store.get("k") == Entry(None, 0)
    store.database.close()
    engine.dispose()


def test_a_call_that_still_runs_at_the_close_closes_its_connection(engine):
    database = SqlDatabase(engine)
    begun, go_on, used = threading.Event(), threading.Event(), []

    def work(connection):
        used.append(connection.connection.connection.driver_connection)
        begun.set()
        assert go_on.wait(10)

    caller = threading.Thread(target=database.run, args=(work,))
    caller.start()
    assert begun.wait(10)
    database.close()
    go_on.set()
    caller.join(10)
    (connection,) = used
    deadline = time.monotonic() + 10
    while not is_closed(connection) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert is_closed(connection)


def test_a_call_over_an_async_engine_that_still_runs_at_the_close_gets_its_answer(engine, tmp_path):
    database = SqlDatabase(create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/keys.db"))
    begun, answers = threading.Event(), []

    def work(connection):
        begun.set()
        connection.execute(f"DELETE FROM {KEYS}")
        return "done"

    caller = threading.Thread(target=lambda: answers.append(database.run(work)))
    writer = sqlite3.connect(f"{tmp_path}/keys.db", isolation_level=None, check_same_thread=False)
    writer.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.3, writer.execute, ["ROLLBACK"])
    try:
        caller.start()
        assert begun.wait(10)
        release.start()
        database.close()
        caller.join(10)
    finally:
        release.join()
        writer.close()
    assert answers == ["done"]


def is_closed(connection):
    try:
        connection.execute("SELECT 1")
    except sqlite3.ProgrammingError as error:
        return "closed" in str(error)
    return False


def test_a_swap_within_a_transaction_of_the_application_is_undone_with_it(engine, store):
    from dramatiq_policies.sql.database import SqlConnection

    store.put("k", b"claim", LONG)
    for commit in (False, True):
        with engine.connect() as connection:
            assert store.swap_within(SqlConnection(connection), "k", b"claim", b"completed", LONG) is True
            assert store.swap_within(SqlConnection(connection), "k", b"claim", b"completed", LONG) is False
            connection.commit() if commit else connection.rollback()
        assert store.get("k").value == (b"completed" if commit else b"claim")


# In memory.


class TestInMemory(IdempotencyStoreContract):
    rivals = 25
    shared = False

    @pytest.fixture
    def store(self):
        engine = sa.create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
        create_tables(engine)
        store = SqlStore(engine)
        yield store
        store.database.close()
        engine.dispose()


class TestInMemoryAsync(IdempotencyStoreContract):
    rivals = 25
    shared = False
    # The database lives in a thread of aiosqlite, which is not in a child.
    test_a_forked_child_uses_it_too_and_so_does_the_parent_afterwards = None  # type: ignore[assignment]

    @pytest.fixture
    def store(self):
        engine = create_async_engine("sqlite+aiosqlite://")
        store = SqlStore(engine)
        create_tables(engine)
        yield store
        store.database.close()
        asyncio.run(engine.dispose())


def test_a_database_in_memory_is_a_warning_and_a_file_is_none(store):
    engine = sa.create_engine("sqlite://", poolclass=StaticPool)
    create_tables(engine)
    assert SqlStore(engine).warnings() == [
        "The idempotency store is an SQLite database in memory: other processes see no keys."
    ]
    assert store.warnings() == []
    engine.dispose()


# With SQLAlchemy 2.0.0 a callback of its pool fails, unseen by its caller.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <function _ConnectionRecord:pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("pool", [None, StaticPool])
def test_a_transaction_of_the_application_on_the_connection_in_memory_is_neither_committed_nor_undone(pool):
    engine = sa.create_engine("sqlite://", poolclass=pool)
    create_tables(engine)
    store = SqlStore(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE orders (id INTEGER)")
    for ends in ("rollback", "commit"):
        with engine.connect() as connection:
            connection.exec_driver_sql("INSERT INTO orders VALUES (1)")
            store.put(ends, b"one", LONG)
            assert store.get(ends).value == b"one"
            getattr(connection, ends)()
            assert connection.exec_driver_sql("SELECT COUNT(*) FROM orders").scalar() == (ends == "commit")
        assert store.get(ends).value == (b"one" if ends == "commit" else None)
    engine.dispose()


# The test kit.


def test_in_the_kit_a_store_keeps_its_database_with_keys_of_a_fresh_namespace(engine, store):
    broker = install(StubBroker(), idempotency=Idempotency(store))
    ran = []

    @dramatiq.actor(broker=broker, idempotency_key="charge:{order_id}")
    def charge(order_id):
        ran.append(order_id)

    for turn in (1, 2):
        with stub(broker) as stubbed:
            charge.send(7)
            charge.send(7)
            assert drain(stubbed).outcomes(charge) == ["succeeded", "duplicate"]
        assert ran == [7] * turn
        assert count(engine) == turn


def test_in_the_kit_keys_expire_in_virtual_time(store):
    broker = install(StubBroker(), idempotency=Idempotency(store))
    ran = []

    @dramatiq.actor(broker=broker, idempotency_key="charge:{order_id}", idempotency_ttl=1_000_000)
    def charge(order_id):
        ran.append(order_id)

    with stub(broker) as stubbed:
        for delay in (None, 900_000, 1_100_000):
            charge.send_with_options(args=(7,), delay=delay)
        assert drain(stubbed).outcomes(charge) == ["succeeded", "duplicate", "succeeded"]
