"""SqlStore against real servers that hang, restart and are locked, and processes that are killed."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from dramatiq_policies.errors import MissingTable
from dramatiq_policies.idempotency.store_client import StoreClient, StoreDown
from dramatiq_policies.sql import SqlStore, create_tables, metadata
from dramatiq_policies.sql.database import SqlDatabase
from dramatiq_policies.stores import Renewal
from dramatiq_policies.testing.concurrency import in_a_child, run_concurrently
from dramatiq_policies.transactions.database import KEYS
from dramatiq_policies.transactions.threads import NoAnswer

from ..proxy import Proxy
from .databases import ASYNC, SYNC, with_driver
from .places import until

ROOT = Path(__file__).parents[2]
LONG = 60_000


class Stores:
    """Makes stores whose connections are closed at the end."""

    def __init__(self) -> None:
        self.made: list[SqlStore] = []

    def __call__(self, url: str, drivers: dict[str, str] = SYNC, *, patience: int = 5_000, **options: Any) -> SqlStore:
        engine: Any = sa.create_engine(with_driver(url, drivers), **options)
        store = SqlStore(AsyncEngine(engine) if drivers is ASYNC else engine)
        store.database = SqlDatabase(store.engine, patience=patience)
        self.made.append(store)
        return store


@pytest.fixture
def make_store() -> Iterator[Stores]:
    stores = Stores()
    yield stores
    for store in stores.made:
        store.database.close()


# Servers that fail.


@pytest.mark.parametrize("drivers", [SYNC, ASYNC], ids=["sync", "async"])
def test_a_server_that_hangs_fails_each_call_in_time_and_serves_again_when_it_is_back(
    server_url: str, drivers: dict[str, str], make_store: Stores
) -> None:
    with Proxy.before(server_url) as proxy:
        store = make_store(proxy.url, drivers, patience=700)
        store.put("k", b"one", LONG)
        proxy.stall()
        began = time.monotonic()
        with ThreadPoolExecutor(12) as pool:
            calls = [pool.submit(store.get, "k") for _ in range(12)]
            errors = [call.exception(10) for call in calls]
        assert {type(error) for error in errors} == {NoAnswer}
        assert time.monotonic() - began < 3
        proxy.resume()
        assert until(lambda: answers(store, "k")) == b"one"
        until(lambda: proxy.connections <= 4)


def answers(store: SqlStore, key: str) -> bytes | None:
    try:
        return store.get(key).value
    except Exception:
        return None


@pytest.mark.parametrize("drivers", [SYNC, ASYNC], ids=["sync", "async"])
def test_a_server_that_is_away_is_an_error_at_once(
    server_url: str, drivers: dict[str, str], make_store: Stores
) -> None:
    with Proxy.before(server_url) as proxy:
        store = make_store(proxy.url, drivers)
        store.put("k", b"one", LONG)
        proxy.refuse()
        proxy.cut()
        began = time.monotonic()
        with pytest.raises((sa.exc.DBAPIError, OSError)):
            store.get("k")
        assert time.monotonic() - began < 3
        proxy.accept()
        assert store.get("k").value == b"one"


@pytest.mark.parametrize("drivers", [SYNC, ASYNC], ids=["sync", "async"])
def test_connections_that_the_server_has_closed_fail_no_call(
    server_url: str, drivers: dict[str, str], make_store: Stores
) -> None:
    with Proxy.before(server_url) as proxy:
        store = make_store(proxy.url, drivers)
        for number in range(3):
            run_concurrently(lambda thread, number=number: store.put(f"k{thread % 8}", b"%d" % number, LONG))  # type: ignore[misc]
            assert proxy.cut() > 0
        assert store.get("k0").value == b"2"


@pytest.mark.parametrize("drivers", [SYNC, ASYNC], ids=["sync", "async"])
def test_a_claim_whose_answer_is_lost_is_found_by_the_repeated_call(
    server_url: str, drivers: dict[str, str], make_store: Stores
) -> None:
    with Proxy.before(server_url) as proxy:
        store = make_store(proxy.url, drivers)
        store.put("other", b"one", LONG)
        lost = proxy.cut_when(store.name_of("k").encode(), after=True)
        found = store.swap("k", None, b"mine", LONG)
        assert lost.wait()
        assert found is not None
        assert found.value == b"mine"


# Locks.


def test_a_row_that_another_transaction_has_locked_fails_its_own_key_soon_and_no_other(
    server_url: str, make_store: Stores
) -> None:
    store = make_store(server_url)
    for key in ("locked", "free"):
        store.put(key, b"one", LONG)
    engine = sa.create_engine(with_driver(server_url))
    with engine.connect() as standing_still:
        standing_still.execute(
            sa.text(f"UPDATE {KEYS} SET value = :value WHERE name = :name"),
            {"value": b"two", "name": store.name_of("locked")},
        )
        began = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            blocked = [pool.submit(store.swap, "locked", b"one", b"three", LONG) for _ in range(4)]
            assert store.get("locked").value == b"one"
            assert all(isinstance(one.exception(10), sa.exc.DBAPIError) for one in blocked)
        assert time.monotonic() - began < 4
        assert store.swap("free", b"one", b"two", LONG) is None
        standing_still.rollback()
    engine.dispose()
    assert store.swap("locked", b"one", b"three", LONG) is None


def test_a_writer_of_the_application_that_is_soon_over_delays_a_claim_on_sqlite_and_fails_none(
    sqlite_url: str, make_store: Stores
) -> None:
    store = make_store(sqlite_url)
    create_tables(store.engine)
    engine = sa.create_engine(with_driver(sqlite_url))
    with engine.connect() as writer, ThreadPoolExecutor(4) as pool:
        writer.exec_driver_sql("BEGIN IMMEDIATE")
        claims = [pool.submit(store.swap, f"k{number}", None, b"one", LONG) for number in range(4)]
        time.sleep(1.5)  # Longer than SQLite's own wait.
        writer.rollback()
        assert [claim.result(10) for claim in claims] == [None] * 4
    engine.dispose()


def test_a_writer_of_the_application_that_stands_still_fails_a_claim_on_sqlite_in_time(
    sqlite_url: str, make_store: Stores
) -> None:
    store = make_store(sqlite_url, patience=1_200)
    create_tables(store.engine)
    engine = sa.create_engine(with_driver(sqlite_url))
    with engine.connect() as writer:
        writer.exec_driver_sql("BEGIN IMMEDIATE")
        with pytest.raises((sa.exc.OperationalError, NoAnswer)):
            store.swap("k", None, b"one", LONG)
        writer.rollback()
    engine.dispose()
    assert until(lambda: store.swap("k", None, b"one", LONG) is None or store.get("k").value == b"one")


# Isolation.

ISOLATED = {
    "postgresql": lambda level: {
        "connect_args": {"options": f"-c default_transaction_isolation={level.lower().replace(' ', chr(92) + ' ')}"}
    },
    "mariadb": lambda level: {"connect_args": {"init_command": f"SET SESSION TRANSACTION ISOLATION LEVEL {level}"}},
}


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("pooled", [True, False], ids=["pool", "NullPool"])
def test_no_swap_is_lost_at_any_isolation_level_of_the_application(
    server_url: str, level: str, pooled: bool, make_store: Stores
) -> None:
    options: dict[str, Any] = ISOLATED[sa.make_url(server_url).drivername](level)
    store = make_store(server_url, **options, **({} if pooled else {"poolclass": sa.NullPool}))
    store.put("k", b"0", LONG)

    def increment(_: int) -> None:
        expected = b"0"
        while (found := store.swap("k", expected, b"%d" % (int(expected) + 1), LONG)) is not None:
            assert found.value is not None
            expected = found.value

    increments = 24 if pooled else 8
    with ThreadPoolExecutor(increments) as pool:
        list(pool.map(increment, range(increments)))
    assert store.get("k").value == b"%d" % increments


# Connections.


def test_a_hundred_threads_use_four_connections(server_url: str, make_store: Stores) -> None:
    store = make_store(server_url)
    watch = sa.create_engine(with_driver(server_url), isolation_level="AUTOCOMMIT")
    count = {
        "postgresql": "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database()",
        "mariadb": "SELECT COUNT(*) FROM information_schema.processlist WHERE db = DATABASE()",
    }[sa.make_url(server_url).drivername]
    with watch.connect() as connection:
        others = connection.exec_driver_sql(count).scalar_one()
        seen = []

        def work(number: int) -> None:
            for turn in range(3):
                store.put(f"k{number}", b"%d" % turn, LONG)
                if number == 0:
                    seen.append(connection.exec_driver_sql(count).scalar_one())

        run_concurrently(work)
    watch.dispose()
    assert max(seen) - others <= 4
    assert max(seen) - others > 1


def test_claims_need_no_connection_of_the_application_s_pool(server_url: str, make_store: Stores) -> None:
    store = make_store(server_url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    assert isinstance(store.engine, sa.Engine)
    with store.engine.connect():
        assert store.swap("k", None, b"one", LONG) is None


@pytest.mark.parametrize("drivers", [SYNC, ASYNC], ids=["sync", "async"])
def test_an_engine_made_and_used_before_a_fork_serves_both_processes(
    database_url: str, drivers: dict[str, str], make_store: Stores
) -> None:
    store = make_store(database_url, drivers)
    engine = store.engine
    store.put("k", b"parent", LONG)
    if isinstance(engine, sa.Engine):
        with engine.connect() as connection:
            connection.execute(sa.select(1))

    def in_child() -> None:
        assert store.get("k").value == b"parent"
        assert store.swap("child", None, b"child", LONG) is None
        if isinstance(engine, sa.Engine):
            with engine.connect() as connection:
                assert connection.scalar(sa.select(7)) == 7

    in_a_child(in_child)
    assert store.get("child").value == b"child"
    if isinstance(engine, sa.Engine):
        with engine.connect() as connection:
            assert connection.scalar(sa.select(8)) == 8
        engine.dispose()


def test_the_application_s_own_connections_stay_as_they_are(server_url: str, make_store: Stores) -> None:
    store = make_store(server_url)
    engine = store.engine
    assert isinstance(engine, sa.Engine)
    level = {"postgresql": "READ COMMITTED", "mariadb": "REPEATABLE READ"}[engine.dialect.name]
    timeout = {"postgresql": "SHOW lock_timeout", "mariadb": "SELECT @@innodb_lock_wait_timeout"}[engine.dialect.name]
    for _ in range(2):
        with engine.connect() as connection:
            assert connection.get_isolation_level() == level
            assert str(connection.exec_driver_sql(timeout).scalar_one()) in ("0", "50")
            connection.exec_driver_sql(f"DELETE FROM {KEYS}")
            connection.rollback()
        store.put("k", b"one", LONG)
    engine.dispose()


def test_the_application_s_connection_events_hold_for_the_store(postgresql_url: str, make_store: Stores) -> None:
    store = make_store(postgresql_url)
    engine = store.engine
    assert isinstance(engine, sa.Engine)

    @sa.event.listens_for(engine, "connect")
    def choose_schema(dbapi_connection: Any, _record: Any) -> None:
        with dbapi_connection.cursor() as cursor:
            cursor.execute("SET search_path = elsewhere")

    # The listeners of the moment count.
    store.database = SqlDatabase(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE SCHEMA IF NOT EXISTS elsewhere")
        metadata.create_all(connection)
    try:
        store.put("k", b"one", LONG)
        with engine.connect() as connection:
            assert connection.exec_driver_sql(f"SELECT COUNT(*) FROM elsewhere.{KEYS}").scalar_one() == 1
    finally:
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP SCHEMA elsewhere CASCADE")
        engine.dispose()
        store.database.close()


@pytest.mark.parametrize("pool", [sa.StaticPool, sa.AssertionPool])
@pytest.mark.parametrize("drivers", [SYNC, ASYNC], ids=["sync", "async"])
def test_an_engine_with_a_single_connection_serves_many_threads(
    server_url: str, drivers: dict[str, str], pool: type[sa.Pool], make_store: Stores
) -> None:
    store = make_store(server_url, drivers, poolclass=pool)
    with ThreadPoolExecutor(8) as threads:
        swaps = [threads.submit(store.swap, "k", None, b"%d" % number, LONG) for number in range(8)]
        assert sum(swap.result(10) is None for swap in swaps) == 1


@pytest.mark.parametrize("drivers", [SYNC, ASYNC], ids=["sync", "async"])
def test_a_store_that_is_dropped_leaves_neither_threads_nor_connections(
    server_url: str, drivers: dict[str, str]
) -> None:
    def use() -> list[threading.Thread]:
        before = set(threading.enumerate())
        engine: Any = sa.create_engine(with_driver(proxy.url, drivers))
        store = SqlStore(AsyncEngine(engine) if drivers is ASYNC else engine)
        store.put("k", b"one", LONG)
        assert proxy.connections == 1
        return [thread for thread in threading.enumerate() if thread not in before]

    with Proxy.before(server_url) as proxy:
        threads = use()
        gc.collect()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        until(lambda: proxy.connections == 0)
    assert threads != []


# Rows.


def test_a_write_deletes_a_batch_of_expired_keys(
    database_url: str, database_engine: sa.Engine, make_store: Stores
) -> None:
    store = make_store(database_url)
    rows = [{"name": f"{number:064x}", "value": b"x", "expires_at": number} for number in range(700)]
    with database_engine.begin() as connection:
        connection.execute(sa.insert(metadata.tables[KEYS]), rows)

    def left() -> int:
        with database_engine.connect() as connection:
            found = connection.scalar(sa.text(f"SELECT COUNT(*) FROM {KEYS} WHERE expires_at < 1000"))
            assert found is not None
            return found

    seen = [700]
    for number in range(200):
        store.put(f"k{number}", b"one", LONG)
        if left() != seen[-1]:
            seen.append(left())
    assert seen == [700, 200, 0]
    assert all(store.get(f"k{number}").value == b"one" for number in range(200))


def test_a_missing_table_is_logged_once_with_advice(
    database_url: str, database_engine: sa.Engine, make_store: Stores, caplog: pytest.LogCaptureFixture
) -> None:
    store, client = make_store(database_url), StoreClient()
    metadata.drop_all(database_engine)
    try:
        for _ in range(3):
            with pytest.raises(StoreDown, match="MissingTable"):
                client.call(lambda: store.swap("k", None, b"one", LONG))
        with pytest.raises(MissingTable):
            store.warnings()
    finally:
        create_tables(database_engine)
    (record,) = caplog.records
    assert record.levelname == "CRITICAL"
    assert "dramatiq_policies.sql.create_tables(engine)" in record.getMessage()
    assert client.call(lambda: store.swap("k", None, b"one", LONG)) is None


def test_a_server_that_may_forget_commits_is_a_warning(server_url: str, make_store: Stores) -> None:
    on, options = {
        "postgresql": ("synchronous_commit", {"options": "-c synchronous_commit=off"}),
        "mariadb": ("MyISAM", {}),
    }[sa.make_url(server_url).drivername]
    engine = sa.create_engine(with_driver(server_url))
    if on == "MyISAM":
        with engine.begin() as connection:
            connection.exec_driver_sql(f"ALTER TABLE {KEYS} ENGINE = MyISAM")
    try:
        warnings = make_store(server_url, connect_args=options).warnings()
    finally:
        if on == "MyISAM":
            with engine.begin() as connection:
                connection.exec_driver_sql(f"ALTER TABLE {KEYS} ENGINE = InnoDB")
        engine.dispose()
    assert [warning for warning in warnings if on in warning and "may then run twice" in warning] != []


# Processes.

COUNTER = """
import sys
from dramatiq_policies.sql import SqlStore
import sqlalchemy as sa

store = SqlStore(sa.create_engine(sys.argv[1]))
for number in range(int(sys.argv[2])):
    expected = store.get("k").value
    while (found := store.swap("k", expected, b"%d" % (int(expected) + 1), 600_000)) is not None:
        expected = found.value
    print(number, flush=True)
"""


def test_no_swap_of_several_processes_is_lost_though_one_is_killed(database_url: str, make_store: Stores) -> None:
    store = make_store(database_url)
    store.put("k", b"0", 600_000)
    command = [sys.executable, "-c", COUNTER, with_driver(database_url)]
    processes = [
        subprocess.Popen([*command, str(turns)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for turns in (50, 50, 100_000)
    ]
    try:
        assert processes[2].stdout is not None
        for _ in range(10):
            processes[2].stdout.readline()
        processes[2].send_signal(signal.SIGKILL)
        outputs = [process.stdout.read().split() for process in processes if process.stdout is not None]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    reported = 10 + sum(map(len, outputs))
    value = store.get("k").value
    assert value is not None
    assert int(value) - reported in (0, 1)


def test_a_single_thread_of_several_processes_gets_the_register(database_url: str) -> None:
    code = """
import sys
from dramatiq_policies.sql import SqlStore
from dramatiq_policies.testing.concurrency import run_concurrently
import os, sqlalchemy as sa

store = SqlStore(sa.create_engine(sys.argv[1]))
store.get("k")
print("ready", flush=True)
sys.stdin.readline()
for turn in range(5):
    answers = run_concurrently(lambda number: store.swap(f"k{turn}", None, b"%d %d" % (os.getpid(), number), 60_000))
    print(sum(answer is None for answer in answers), flush=True)
"""
    command = [sys.executable, "-c", code, with_driver(database_url)]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        outputs = [list(map(int, process.communicate(timeout=60)[0].split())) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [sum(wins) for wins in zip(*outputs, strict=True)] == [1] * 5


def test_an_interrupt_of_the_waiting_thread_leaves_the_connection_whole(server_url: str, make_store: Stores) -> None:
    import ctypes

    with Proxy.before(server_url) as proxy:
        store = make_store(proxy.url, pool_size=1, max_overflow=0)
        store.put("k", b"one", LONG)

        class Interrupt(BaseException):
            pass

        caught = []

        def wait() -> None:
            try:
                store.get("k")
            except Interrupt as interrupt:
                caught.append(interrupt)

        proxy.stall("to_client")
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.2)
        assert thread.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Interrupt))
        proxy.resume()
        thread.join()
        assert len(caught) <= 1
        assert store.get("k").value == b"one"
        assert store.renew([Renewal("k", b"one", LONG)]) == [True]
