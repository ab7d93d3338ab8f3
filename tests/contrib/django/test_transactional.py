"""Transactional jobs with Django's ORM on SQLite; on servers in tests/integration/test_django_transactional.py."""

from __future__ import annotations

import sqlite3
from contextlib import suppress

import django
import dramatiq
import pytest
from django.db import connections, transaction
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import AsyncIO

from dramatiq_policies import ConfigurationError, Idempotency, install
from dramatiq_policies.contrib.django import DjangoOutbox, DjangoStore

from . import project
from .shop.models import Order
from .transactional_jobs import Shop, TransactionalJobs


class TestOnSQLite(TransactionalJobs):
    @pytest.fixture
    def alias(self):
        return "default"


@pytest.fixture
def in_memory():
    name = "file:transactional?mode=memory&cache=shared"
    with project.database("memory", ENGINE="django.db.backends.sqlite3", NAME=name) as alias:
        project.make_tables(alias)
        shop = Shop(alias)
        yield shop
        shop.close()


def test_in_a_test_case_with_a_database_in_memory_the_job_s_messages_are_sent_when_it_ends(in_memory):
    shop = in_memory

    def place(email):
        shop.create(email)
        shop.tell.send(email)

    shop.actor(place).send("ada")
    block = transaction.atomic(using=shop.alias)
    block._from_testcase = True
    with block:
        shop.drain()
        assert (shop.orders(), shop.told) == (["ada"], [("ada",)])
        transaction.set_rollback(True, using=shop.alias)
    assert shop.orders() == []


@pytest.fixture
def in_a_file(tmp_path):
    with project.database("file", ENGINE="django.db.backends.sqlite3", NAME=str(tmp_path / "shop.db")) as alias:
        project.make_tables(alias)
        shop = Shop(alias)
        yield shop
        shop.close()


def test_a_job_begins_on_a_new_connection_if_the_old_has_reached_its_age(in_a_file):
    shop, connection = in_a_file, connections[in_a_file.alias]
    old, used = connection.connection, []
    connection.close_at = 0
    shop.actor(lambda email: used.append(connection.connection)).send("ada")
    shop.drain()
    assert old is not None
    assert used != [old]
    assert len(used) == 1


@pytest.mark.parametrize("mode", [None, "EXCLUSIVE"])
def test_after_a_job_transactions_on_sqlite_begin_as_before(in_a_file, mode):
    connection, modes = connections[in_a_file.alias], []
    connection.close_at, connection.transaction_mode = None, mode
    in_a_file.actor(lambda email: modes.append(connection.transaction_mode)).send("ada")
    in_a_file.drain()
    assert [*modes, connection.transaction_mode] == [mode, mode]


def test_a_job_on_sqlite_reads_and_then_writes_although_another_process_wants_to_write_meanwhile(in_a_file):
    shop, connection = in_a_file, connections[in_a_file.alias]
    connection.cursor().execute("PRAGMA journal_mode = WAL")
    other = sqlite3.connect(connection.settings_dict["NAME"], timeout=0, isolation_level=None)

    def place(email):
        assert shop.orders() == []
        with suppress(sqlite3.OperationalError):
            other.execute(f"INSERT INTO {Order._meta.db_table} (email) VALUES ('eve')")
        shop.create(email)

    shop.actor(place).send("ada")
    shop.drain()
    other.close()
    # Before Django 5.1 a transaction begins without the lock for writes.
    assert (shop.orders(), shop.outcomes()) == (
        (["ada"], [("succeeded", None)]) if django.VERSION >= (5, 1) else (["eve"], [("dead", "exhausted")])
    )


def declare(outbox, idempotency, fn, **options):
    broker = install(StubBroker(middleware=[AsyncIO()]), outbox=outbox, idempotency=idempotency)
    return dramatiq.actor(fn, broker=broker, transactional=True, **{"idempotent": True, **options})


def job():
    pass


async def async_job():
    pass


@pytest.mark.parametrize(
    ("outbox", "store", "fn", "expected"),
    [
        (DjangoOutbox, lambda: DjangoStore("other"), job, r"Pass the same alias to both: DjangoOutbox\('default'\)"),
        (DjangoOutbox, DjangoStore, async_job, "needs a sync actor, because Django has no async transactions"),
        (DjangoOutbox, None, job, "needs the idempotency keys in the outbox's database"),
    ],
)
def test_an_actor_that_can_t_be_transactional_is_refused(outbox, store, fn, expected):
    with pytest.raises(ConfigurationError, match=expected):
        declare(outbox(), Idempotency(store()) if store else None, fn)
