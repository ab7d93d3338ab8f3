"""Sends inside of `atomic`, on SQLite and a StubBroker; on servers in tests/integration/test_django_outbox.py."""

from __future__ import annotations

import asyncio
import threading
from datetime import timedelta

import dramatiq
import dramatiq.broker
import pytest
from asgiref.sync import sync_to_async
from django.db import connection, connections, transaction
from django.test import Client, TestCase, TransactionTestCase
from dramatiq import Message, group, pipeline

from dramatiq_policies import ConfigurationError
from dramatiq_policies.contrib.django import DjangoOutbox, WarnInsideAtomic
from dramatiq_policies.testing import drain, stub
from dramatiq_policies.transactions.outbox_table import MESSAGE, NewRow

from ...transactions.stub_shop import StubShop
from . import project
from .shop.models import Order


class Undo(Exception):
    pass


class Shop(StubShop):
    """An application with a DjangoOutbox."""

    def __init__(self, *middleware, **options):
        super().__init__(DjangoOutbox(**options), *middleware)

    def close(self):
        if "database" in vars(self.outbox):
            self.outbox.database.close()


@pytest.fixture(autouse=True)
def tables():
    project.make_tables()
    yield
    connection.close()


@pytest.fixture
def shop(monkeypatch):
    shop = Shop()
    monkeypatch.setattr(dramatiq.broker, "global_broker", shop.broker)
    yield shop
    shop.close()


def test_a_message_is_sent_when_its_transaction_commits(shop):
    with transaction.atomic():
        Order.objects.create(email="ada")
        message = shop.confirm.send(1)
        assert shop.queued() == []
    assert shop.queued() == [(1,)]
    assert Message.decode(shop.broker.queues["mail"].queue[0]).message_id == message.message_id
    assert shop.pending() == 0


def test_a_message_of_a_transaction_that_is_rolled_back_is_never_sent(shop):
    with pytest.raises(Undo), transaction.atomic():
        shop.confirm.send(1)
        raise Undo
    with transaction.atomic():
        shop.confirm.send(2)
        transaction.set_rollback(True)
    assert shop.queued() == []
    assert shop.pending() == 0


def test_a_savepoint_that_is_rolled_back_takes_its_messages_along_and_no_other(shop):
    with transaction.atomic():
        with pytest.raises(Undo), transaction.atomic():
            shop.confirm.send("first, undone")
            raise Undo
        shop.confirm.send("kept")
        with transaction.atomic():
            shop.confirm.send("kept, of a savepoint")
        with pytest.raises(Undo), transaction.atomic():
            with transaction.atomic():
                shop.confirm.send("undone with the block around it")
            raise Undo
    assert shop.queued() == [("kept",), ("kept, of a savepoint",)]
    assert shop.pending() == 0


def test_only_the_first_message_is_of_a_savepoint_that_stays(shop):
    with transaction.atomic():
        with transaction.atomic():
            shop.confirm.send(1)
        with pytest.raises(Undo), transaction.atomic():
            raise Undo
    assert shop.queued() == [(1,)]


def test_outside_of_a_transaction_a_message_is_sent_at_once(shop):
    shop.confirm.send(1)
    assert shop.queued() == [(1,)]
    transaction.set_autocommit(False)
    try:
        shop.confirm.send(2)
    finally:
        transaction.rollback()
        transaction.set_autocommit(True)
    assert shop.queued() == [(1,), (2,)]


def test_an_actor_without_the_outbox_sends_at_once(shop):
    with transaction.atomic():
        shop.at_once.send(1)
        assert shop.queued() == [(1,)]


def test_on_commit_callbacks_send_at_once(shop):
    with transaction.atomic():
        transaction.on_commit(lambda: shop.confirm.send("by the callback"))
        shop.confirm.send("in the transaction")
    assert sorted(shop.queued()) == [("by the callback",), ("in the transaction",)]


def test_the_next_transaction_is_not_the_last(shop):
    for number in range(3):
        with transaction.atomic():
            shop.confirm.send(number)
        with pytest.raises(Undo), transaction.atomic():
            shop.confirm.send("undone")
            raise Undo
    assert shop.queued() == [(0,), (1,), (2,)]


def test_two_brokers_send_their_own_messages_of_one_transaction(shop):
    other = Shop(namespace="other")
    with transaction.atomic():
        shop.confirm.send(1)
        other.confirm.send(2)
        shop.confirm.send(3)
    assert (shop.queued(), other.queued()) == ([(1,), (3,)], [(2,)])
    other.close()


def test_groups_pipelines_and_delays_are_rows_too(shop):
    with transaction.atomic():
        group([shop.confirm.message(1), shop.confirm.message(2)]).run()
        pipeline([shop.confirm.message(3), shop.confirm.message(4)]).run()
        sent = shop.confirm.send_with_options(args=(5,), delay=timedelta(hours=1))
        shop.broker.enqueue(shop.confirm.message(6))
        assert shop.queued() == []
        assert shop.queued("mail.DQ") == []
    assert shop.queued() == [(1,), (2,), (3,), (6,)]
    (delayed,) = (Message.decode(body) for body in shop.broker.queues["mail.DQ"].queue)
    assert delayed.options["eta"] == sent.options["eta"]


def test_hooks_run_before_the_row_and_after_the_publication(shop):
    with transaction.atomic():
        message = shop.confirm.send_with_options(args=(1,), delay=1_000)
        assert shop.hooks.before == [(message.message_id, 1_000)]
        assert shop.hooks.after == []
    assert shop.hooks.before == [(message.message_id, 1_000)]
    assert shop.hooks.after == [(message.message_id, 1_000, "known")]


def test_another_thread_of_a_transaction_sends_at_once(shop):
    with transaction.atomic():
        thread = threading.Thread(target=shop.confirm.send, args=(1,))
        thread.start()
        thread.join()
        assert shop.queued() == [(1,)]


def test_a_view_with_atomic_requests_sends_with_its_transaction(shop, monkeypatch):
    monkeypatch.setitem(connections.settings["default"], "ATOMIC_REQUESTS", True)
    client = Client(raise_request_exception=False)
    assert client.get("/order?email=ada").status_code == 200
    assert client.get("/order?email=bob&fail=1").status_code == 500
    assert shop.queued() == [("ada",)]
    assert [order.email for order in Order.objects.all()] == ["ada"]


def test_sync_code_with_a_transaction_that_async_code_calls_sends_with_the_transaction(shop):
    @transaction.atomic
    def place(email):
        Order.objects.create(email=email)
        shop.confirm.send(email)
        queued = shop.queued()
        if email == "bob":
            raise Undo
        return queued

    async def view():
        assert await sync_to_async(place)("ada") == []
        with pytest.raises(Undo):
            await sync_to_async(place)("bob")
        shop.confirm.send("from the loop, at once")
        await sync_to_async(connections.close_all)()

    asyncio.run(view())
    assert shop.queued() == [("ada",), ("from the loop, at once",)]


def test_in_a_test_case_the_blocks_of_the_application_count_and_captured_callbacks_send(shop):
    class Case(TestCase):
        def test(self):
            shop.confirm.send("outside of a block of the application")
            assert shop.queued() == [("outside of a block of the application",)]
            with transaction.atomic():
                shop.confirm.send("never, for no callback runs")
            assert len(shop.queued()) == 1
            with self.captureOnCommitCallbacks(execute=True):
                with transaction.atomic():
                    Order.objects.create(email="ada")
                    shop.confirm.send("captured")
                    assert len(shop.queued()) == 1
                with pytest.raises(Undo), transaction.atomic():
                    shop.confirm.send("undone")
                    raise Undo
            assert shop.queued()[-1] == ("captured",)
            drain(shop.broker)
            with self.captureOnCommitCallbacks(execute=True), transaction.atomic():
                shop.confirm.send("captured later")
            assert shop.queued() == [("captured later",)]

    project.run_case(Case)
    assert shop.pending() == 0
    assert not Order.objects.exists()


def test_in_a_transaction_test_case_a_commit_sends(shop, monkeypatch):
    class Case(TransactionTestCase):
        available_apps = ()

        def test(self):
            with transaction.atomic():
                shop.confirm.send(1)
                assert shop.queued() == []
            assert shop.queued() == [(1,)]

    # Its flush at the end would not find the tables of other apps.
    monkeypatch.setattr(Case, "_fixture_teardown", lambda self: None)
    project.run_case(Case)


def test_a_missing_table_is_an_error_with_the_command_that_makes_it(shop):
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE dramatiq_policies_outbox RENAME TO hidden")
    try:
        with (
            pytest.raises(ConfigurationError, match=r'run "manage\.py migrate dramatiq_policies"'),
            transaction.atomic(),
        ):
            shop.confirm.send(1)
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE hidden RENAME TO dramatiq_policies_outbox")


def test_a_message_in_a_broken_transaction_is_refused_as_every_query(shop):
    with transaction.atomic():
        with pytest.raises(Undo), transaction.atomic(savepoint=False):
            raise Undo
        with pytest.raises(transaction.TransactionManagementError):
            shop.confirm.send(1)
    assert shop.queued() == []


def test_the_relay_publishes_the_rows_of_a_process_that_died(shop):
    message = shop.confirm.message(1)
    row = NewRow(MESSAGE, message.message_id, message.actor_name, message.queue_name, message.encode(), None)
    shop.outbox.database.run(lambda connection: shop.outbox.table.insert(connection, row, "dead", due=True))
    assert shop.outbox.relay_once() == 1
    assert shop.queued() == [(1,)]


def test_the_kit_s_stub_keeps_the_database_and_has_a_namespace_of_its_own(shop):
    with stub(shop.broker) as stand_in:
        with transaction.atomic():
            shop.confirm.send(1)
            assert drain(stand_in).events == []
        drain(stand_in).assert_outcomes("confirm", "succeeded")
    assert shop.done == [(1,)]
    assert shop.queued() == []
    with transaction.atomic():
        shop.confirm.send(2)
    assert shop.queued() == [(2,)]


def test_the_outbox_covers_its_database_and_warnings_are_of_others(monkeypatch, caplog, tmp_path):
    shop = Shop(WarnInsideAtomic())
    with project.database("other", ENGINE="django.db.backends.sqlite3", NAME=str(tmp_path / "other.sqlite3")):
        with transaction.atomic():
            shop.confirm.send(1)
        assert caplog.records == []
        with transaction.atomic(using="other"):
            shop.confirm.send(2)
            assert shop.queued() == [(1,), (2,)]
        assert "database 'other'" in caplog.text
    shop.close()


@pytest.mark.parametrize("using", ["", None, 3])
def test_an_alias_that_is_no_text_is_refused(using):
    with pytest.raises(ConfigurationError, match=r"DjangoOutbox: using"):
        DjangoOutbox(using)
