"""Django's tasks on real servers, with a worker."""

from __future__ import annotations

import contextlib
import importlib
from datetime import timedelta

import dramatiq.broker
import pytest
from django.tasks import TaskResultStatus, task_backends
from django.utils import timezone
from dramatiq import Message, Worker
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.middleware import AsyncIO
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from dramatiq_policies import Idempotency, install
from dramatiq_policies.stores.memory import MemoryStore

from ..contrib.django import project
from .places import until

project.set_up()
#: Its tasks may use any queue.
ANY = "any"


@pytest.fixture
def set_up(monkeypatch):
    """Makes a broker Dramatiq's global one. Returns the module of the tasks."""

    def set_up(broker):
        monkeypatch.setattr(dramatiq.broker, "global_broker", install(broker, idempotency=Idempotency(MemoryStore())))
        tasks = importlib.import_module("tests.contrib.django.shop.tasks")
        tasks.done.clear()
        return tasks

    return set_up


@contextlib.contextmanager
def working(broker, queue):
    worker = Worker(broker, queues={queue}, worker_timeout=100, worker_threads=1)
    worker.start()
    try:
        yield
    finally:
        worker.stop()


def test_rabbitmq_delivers_the_highest_priority_first(set_up, rabbitmq_url, unique_queue):
    broker = RabbitmqBroker(url=rabbitmq_url, max_priority=10)
    broker.add_middleware(AsyncIO())
    tasks = set_up(broker)
    try:
        for priority in (0, -100, 100, 50):
            tasks.add.using(backend=ANY, queue_name=unique_queue, priority=priority).enqueue(priority, 0)
        bodies = [broker.channel.basic_get(unique_queue, auto_ack=True)[2] for _ in range(4)]
        assert [Message.decode(body).args[0] for body in bodies] == [100, 50, 0, -100]
    finally:
        broker.close()


def test_a_worker_runs_a_task_and_another_process_could_read_the_result(set_up, redis_place, redis_client):
    broker = redis_place.broker()
    broker.add_middleware(AsyncIO())
    broker.add_middleware(
        Results(backend=RedisBackend(client=redis_client, namespace=redis_place.namespace), store_results=True)
    )
    tasks = set_up(broker)
    backend = task_backends[ANY]
    sync = tasks.add.using(backend=ANY, queue_name=redis_place.queue).enqueue(1, 2)
    coroutine = tasks.fetch.using(backend=ANY, queue_name=redis_place.queue).enqueue(3)
    failed = tasks.divide.using(backend=ANY, queue_name=redis_place.queue).enqueue(1, 0)
    with working(broker, redis_place.queue):
        until(lambda: all(backend.get_result(one.id).is_finished for one in (sync, coroutine, failed)))
    assert backend.get_result(sync.id).return_value == 3
    assert backend.get_result(coroutine.id).return_value == [3, [3]]
    assert backend.get_result(failed.id).status == TaskResultStatus.FAILED


def test_a_task_with_run_after_runs_at_its_time(set_up, place):
    broker = place.broker()
    broker.add_middleware(AsyncIO())
    tasks = set_up(broker)
    due = timezone.now() + timedelta(seconds=1)
    tasks.send_mail.using(backend=ANY, queue_name=place.queue, run_after=due).enqueue("ada")
    with working(broker, place.queue):
        until(lambda: tasks.done)
    assert timezone.now() >= due
