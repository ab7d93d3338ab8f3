"""Tasks that are enqueued inside of `atomic`, with and without an outbox."""

from __future__ import annotations

import importlib

import pytest
from django.db import connection, transaction
from django.tasks import TaskResultStatus, default_task_backend
from django.tasks.exceptions import TaskResultDoesNotExist
from django.tasks.signals import task_finished
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import AsyncIO
from dramatiq.results import Results

from dramatiq_policies import ErrorClassifier, Idempotency, RetryPolicy, install
from dramatiq_policies.contrib.django import DjangoOutbox, DjangoStore
from dramatiq_policies.testing import drain

from . import project


class Undo(Exception):
    pass


@pytest.fixture
def shop(set_broker, results):
    project.make_tables()
    broker = StubBroker(middleware=[AsyncIO(), Results(backend=results, store_results=True)])
    broker.outbox = DjangoOutbox()
    store = DjangoStore()
    install(
        broker,
        outbox=broker.outbox,
        idempotency=Idempotency(store),
        error_classifier=ErrorClassifier(unclassified=RetryPolicy(attempts=1)),
    )
    tasks = set_broker(broker)
    yield broker, tasks
    if "database" in vars(broker.outbox):
        broker.outbox.database.close()
    store.database.close()


def test_a_task_is_sent_and_its_result_known_after_the_commit(shop):
    broker, tasks = shop
    with transaction.atomic():
        result = tasks.add.enqueue(1, 2)
        assert result.status == TaskResultStatus.READY
        assert result.enqueued_at is not None
        assert broker.queues["default"].qsize() == 0
        with pytest.raises(TaskResultDoesNotExist):
            default_task_backend.get_result(result.id)
    assert default_task_backend.get_result(result.id) == result
    drain(broker).assert_outcomes(tasks.add.module_path, "succeeded")
    assert default_task_backend.get_result(result.id).return_value == 3


def test_a_task_of_a_transaction_that_is_rolled_back_is_never_sent_and_has_no_result(shop):
    broker, tasks = shop
    with pytest.raises(Undo), transaction.atomic():
        result = tasks.add.enqueue(1, 2)
        raise Undo
    assert broker.queues["default"].qsize() == 0
    with pytest.raises(TaskResultDoesNotExist):
        default_task_backend.get_result(result.id)


def test_a_result_that_a_fast_worker_has_stored_is_not_overwritten(shop):
    broker, tasks = shop
    tasks.add.enqueue(0, 0)
    drain(broker)
    with transaction.atomic():
        transaction.on_commit(lambda: broker.enqueue(message) and drain(broker))
        result = tasks.add.enqueue(1, 2)
        message = broker.get_actor(tasks.add.module_path).message(1, 2).copy(message_id=result.id)
    assert default_task_backend.get_result(result.id).status == TaskResultStatus.SUCCESSFUL


def test_a_transactional_task_is_finished_once_its_transaction_is_committed(shop):
    broker, tasks = shop
    orders = importlib.import_module("tests.contrib.django.shop.orders")
    finished = []

    def receiver(task_result, **kwargs):
        if task_result.task.name == "place_order":
            finished.append((str(task_result.status), connection.in_atomic_block, orders.Order.objects.count()))

    task_finished.connect(receiver)
    try:
        failed = orders.place_order.enqueue("ada", fail=True)
        drain(broker).assert_outcomes(orders.place_order.module_path, "dead")
        placed = orders.place_order.enqueue("bob")
        run = drain(broker)
    finally:
        task_finished.disconnect(receiver)
    run.assert_outcomes(orders.place_order.module_path, "succeeded")
    run.assert_outcomes(tasks.add.module_path, "succeeded")
    assert finished == [("FAILED", False, 0), ("SUCCESSFUL", False, 1)]
    assert default_task_backend.get_result(failed.id).status == TaskResultStatus.FAILED
    assert default_task_backend.get_result(placed.id).status == TaskResultStatus.SUCCESSFUL


def test_without_an_outbox_a_task_does_not_wait_for_the_commit(broker, tasks):
    with transaction.atomic():
        result = tasks.add.enqueue(1, 2)
        assert broker.queues["default"].qsize() == 1
        assert default_task_backend.get_result(result.id) == result
