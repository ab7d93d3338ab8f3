"""The calls of an `SqlDatabase`, and the databases that it takes."""

from __future__ import annotations

import gc
import os
import time

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import StaticPool

from dramatiq_policies import ConfigurationError
from dramatiq_policies.sql import SqlStore, create_tables
from dramatiq_policies.sql.calls import LoopCalls, ThreadCalls
from dramatiq_policies.sql.connection import checked_engine, dialect_of
from dramatiq_policies.sql.database import SqlDatabase
from dramatiq_policies.transactions.threads import NoAnswer

from ..forked import run_forked

ENDS_WITH_AN_OPEN_STORE = """
import asyncio, sys
from sqlalchemy.ext.asyncio import create_async_engine
from dramatiq_policies.sql import SqlStore, create_tables

engine = create_async_engine("sqlite+aiosqlite:///keys.db")
create_tables(engine)
sys.store = store = SqlStore(engine)  # Not left to the garbage collector.
store.put("k", b"claim", 60_000)
asyncio.run(engine.dispose())
print(store.get("k").value)
"""


def test_a_database_of_another_kind_is_refused():
    engine = sa.create_engine("sqlite://")
    engine.dialect.name = "oracle"
    with pytest.raises(ConfigurationError, match="expected an engine of PostgreSQL, MariaDB, MySQL or SQLite"):
        SqlStore(engine)


@pytest.mark.parametrize("scheme", ["mysql", "mariadb"])
def test_urls_of_mariadb_and_mysql_are_of_one_dialect(scheme):
    engine = sa.create_engine(f"{scheme}+pymysql://user@host.invalid/test")
    assert checked_engine("SqlStore", engine) is engine
    assert dialect_of(engine) == "mysql"


def test_the_close_of_async_connections_waits_for_the_end_of_their_thread(tmp_path):
    calls = LoopCalls(create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/keys.db"), 1)
    assert calls.call(lambda connection: connection.execute("SELECT 1").rows, time.monotonic() + 60) == [(1,)]
    thread = calls._thread
    calls.close()
    assert not thread.is_alive()


def test_the_garbage_collector_may_close_async_connections_on_their_own_thread(tmp_path):
    calls = LoopCalls(create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/keys.db"), 1)
    threads = []

    def work(connection):
        threads.append(calls._thread)
        calls.close()
        return "done"

    assert calls.call(work, time.monotonic() + 60) == "done"
    threads[0].join(10)
    assert not threads[0].is_alive()


def test_a_process_ends_although_nobody_closed_its_async_store(tmp_path):
    done = run_forked(["-c", ENDS_WITH_AN_OPEN_STORE], cwd=tmp_path, env=os.environ, timeout=30)
    assert (done.returncode, done.stdout) == (0, "b'claim'\n"), done.stderr


def test_a_store_in_memory_follows_its_engine_to_a_new_connection():
    """An application disposes of its engine after a fork: the old connection shows a database that the application left."""
    engine = sa.create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    create_tables(engine)
    store = SqlStore(engine)
    store.put("k", b"before", 60_000)
    engine.dispose()
    create_tables(engine)
    assert store.get("k").value is None
    store.put("k", b"after", 60_000)
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT COUNT(*) FROM dramatiq_policies_keys")) == 1
    engine.dispose()


@pytest.mark.parametrize("joins", [False, True])
def test_a_call_in_memory_that_fails_leaves_nothing_and_undoes_nothing_of_the_application(joins):
    engine = sa.create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    create_tables(engine)
    database = SqlDatabase(engine)
    insert = "INSERT INTO dramatiq_policies_keys VALUES (:name, 'value', 0)"

    def fails(connection):
        connection.execute(insert, name="of the call")
        raise ZeroDivisionError

    with engine.connect() as connection:
        if joins:
            connection.execute(sa.text(insert), {"name": "of the application"})
        with pytest.raises(ZeroDivisionError):
            database.run(fails)
        # The statements of a call inside of the transaction of the application end with it.
        connection.commit()
        names = connection.scalars(sa.text("SELECT name FROM dramatiq_policies_keys ORDER BY name")).all()
    assert names == (["of the application", "of the call"] if joins else [])
    engine.dispose()


def test_a_call_over_an_async_engine_whose_time_is_over_has_no_answer(tmp_path):
    calls = LoopCalls(create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/keys.db"), 1)
    with pytest.raises(NoAnswer):
        calls.call(lambda connection: connection.execute("SELECT 1").rows, time.monotonic() - 1)
    calls.close()


@pytest.fixture
def closed(monkeypatch):
    """Return the calls closed so far."""
    closed = []
    monkeypatch.setattr(ThreadCalls, "close", lambda calls: closed.append(id(calls)))
    return closed


def test_a_database_that_nobody_holds_closes_its_connections(tmp_path, closed):
    database = SqlDatabase(sa.create_engine(f"sqlite:///{tmp_path}/keys.db"))
    calls = id(database._calls)
    del database
    gc.collect()
    assert calls in closed


def test_a_forked_child_closes_its_own_connections_and_not_those_of_its_parent(tmp_path, closed):
    """The close of an inherited connection would end the session of the parent on the server."""
    database = SqlDatabase(sa.create_engine(f"sqlite:///{tmp_path}/keys.db"))
    inherited = id(database._calls)
    database.reset_after_fork()
    calls = id(database._calls)
    del database
    gc.collect()
    assert calls in closed
    assert inherited not in closed
