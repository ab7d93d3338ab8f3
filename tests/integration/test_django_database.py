"""The library's own connections to Django's databases, beside those of requests and jobs."""

from __future__ import annotations

import threading

import pytest
from django.db import connections
from django.db.utils import DatabaseError

from dramatiq_policies.contrib.django import DjangoStore
from dramatiq_policies.contrib.django.database import DjangoConnection, DjangoDatabase
from dramatiq_policies.errors import MissingTable
from dramatiq_policies.testing.concurrency import in_a_child
from dramatiq_policies.transactions import key_table
from dramatiq_policies.transactions.database import KEYS, NOW

from ..contrib.django import project

project.set_up()

INSERT = f"INSERT INTO {KEYS} (name, value, expires_at) VALUES (:name, :value, :expires_at)"
COUNT = f"SELECT COUNT(*) FROM {KEYS}"


@pytest.fixture
def alias(database_url):
    with project.database("own", **project.options_of(database_url)) as alias:
        yield alias


@pytest.fixture
def database(alias):
    database = DjangoDatabase(alias)
    yield database
    database.close()


def insert(name, connection):
    return connection.execute(INSERT, name=name, value=b"\0%s'\xff", expires_at=2**40).rowcount


def count(database):
    return database.run(lambda connection: connection.execute(COUNT).rows[0][0])


def test_rows_come_back_as_they_were_written(database):
    assert database.run(lambda connection: insert("a%s:x", connection)) == 1
    found = database.run(
        lambda connection: connection.execute(
            f"SELECT name, value, expires_at FROM {KEYS} WHERE name = :name", name="a%s:x"
        )
    )
    assert [tuple(row) for row in found.rows] == [("a%s:x", b"\0%s'\xff", 2**40)]
    now = database.run(lambda connection: connection.execute(f"SELECT {NOW[connection.dialect]}").rows[0][0])
    assert now > 1_700_000_000_000


def test_a_statement_commits_by_itself_also_where_the_application_is_in_a_transaction_or_has_no_autocommit(
    database, alias
):
    connections[alias].set_autocommit(False)
    try:
        database.run(lambda connection: insert("a", connection))
        assert count(database) == 1
    finally:
        connections[alias].rollback()
        connections[alias].set_autocommit(True)


def test_a_transaction_is_there_as_a_whole_or_not_at_all(database):
    def fails(connection):
        insert("a", connection)
        raise KeyError

    with pytest.raises(KeyError):
        database.transaction(fails)
    assert count(database) == 0
    assert database.transaction(lambda connection: [insert("a", connection), insert("b", connection)]) == [1, 1]
    with pytest.raises(DatabaseError):
        database.transaction(lambda connection: [insert("c", connection), insert("a", connection)])
    assert count(database) == 2


@pytest.mark.parametrize("database_url", ["postgresql", "mariadb"], indirect=True)
def test_the_connections_are_few_and_none_is_the_application_s(database, alias):
    seen, ready = set(), threading.Barrier(4)

    def work(connection):
        seen.add(id(connection.connection))
        ready.wait(20)
        return connection.execute("SELECT 1").rows[0][0]

    own = connections[alias]
    threads = [threading.Thread(target=database.run, args=(work,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 4
    assert id(own) not in seen
    own.close()
    assert database.run(lambda connection: connection.execute("SELECT 1").rows[0][0]) == 1


KILL = {
    "postgresql": "SELECT pg_terminate_backend(:id)",
    "mysql": "KILL :id",
}
OWN_ID = {"postgresql": "SELECT pg_backend_pid()", "mysql": "SELECT CONNECTION_ID()"}


@pytest.mark.parametrize("database_url", ["postgresql", "mariadb"], indirect=True)
def test_a_connection_that_the_server_has_closed_is_replaced_unnoticed(database, alias):
    own = DjangoConnection(connections[alias])
    ids = {database.run(lambda connection: connection.execute(OWN_ID[connection.dialect]).rows[0][0]) for _ in range(3)}
    for one in ids:
        own.execute(KILL[own.dialect], id=one)
    assert database.run(lambda connection: insert("a", connection)) == 1
    assert count(database) == 1
    (after,) = {database.run(lambda connection: connection.execute(OWN_ID[connection.dialect]).rows[0][0])}
    assert after not in ids


def test_a_new_connection_whose_settings_fail_is_not_used(database, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("dramatiq_policies.contrib.django.database.session_settings", lambda *_: ["SELECT nothing"])
        for _ in range(2):
            with pytest.raises(DatabaseError, match="nothing"):
                count(database)
    assert count(database) == 0


def test_a_forked_child_has_connections_of_its_own(database):
    database.run(lambda connection: insert("a", connection))
    in_a_child(lambda: database.run(lambda connection: insert("b", connection)))
    database.run(lambda connection: insert("c", connection))
    assert count(database) == 3


def test_in_django_s_test_environment_no_connection_is_kept(database, monkeypatch):
    count(database)
    assert len(database._idle) == 1
    monkeypatch.setattr("django.core.mail.outbox", [], raising=False)
    count(database)
    assert len(database._idle) == 0


def test_a_missing_table_is_named_with_the_command_that_makes_it(alias, monkeypatch):
    monkeypatch.setattr(key_table, "KEYS", "dramatiq_policies_none")
    key_table._statements.cache_clear()
    store = DjangoStore(alias)
    try:
        with pytest.raises(MissingTable, match=r"manage\.py migrate dramatiq_policies --database own"):
            store.get("key")
    finally:
        store.database.close()
        key_table._statements.cache_clear()
