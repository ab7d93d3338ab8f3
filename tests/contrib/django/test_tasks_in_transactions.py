"""Tasks that are enqueued inside of `atomic`, with and without an outbox."""

from __future__ import annotations

import pytest
from django.db import transaction
from django.tasks import TaskResultStatus, default_task_backend
from django.tasks.exceptions import TaskResultDoesNotExist
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import AsyncIO
from dramatiq.results import Results

from dramatiq_policies import install
from dramatiq_policies.contrib.django import DjangoOutbox
from dramatiq_policies.testing import drain

from . import project


class Undo(Exception):
    pass


@pytest.fixture
def shop(set_broker, results):
    project.make_tables()
    broker = StubBroker(middleware=[AsyncIO(), Results(backend=results, store_results=True)])
    broker.outbox = DjangoOutbox()
    install(broker, outbox=broker.outbox)
    tasks = set_broker(broker)
    yield broker, tasks
    if "database" in vars(broker.outbox):
        broker.outbox.database.close()


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


def test_without_an_outbox_a_task_does_not_wait_for_the_commit(broker, tasks):
    with transaction.atomic():
        result = tasks.add.enqueue(1, 2)
        assert broker.queues["default"].qsize() == 1
        assert default_task_backend.get_result(result.id) == result
