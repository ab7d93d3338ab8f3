"""Timeouts on a real broker: the end of a stuck job's process, and the limit of the server."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import redis
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from pika.adapters.utils.selector_ioloop_adapter import SelectorIOServicesAdapter

from dramatiq_policies import RetryPolicy, TimeoutExceeded, constant, current_job
from dramatiq_policies.middleware.timeout import STUCK_EXIT_CODE

from .places import Gate, Place, RabbitmqPlace, RedisPlace, until
from .test_processes import Application

STUCK = """
from dramatiq_policies import Timeout
broker = {broker}
install(broker, timeout=Timeout(grace=100, on_stuck="exit"))
dramatiq.set_broker(broker)

def runs(line):
    return journal.read_text().splitlines().count(line)

@dramatiq.actor(queue_name="{queue}", timeout=300)
def stuck():
    note("stuck begins")
    if runs("stuck begins") == 1:
        time.sleep(3600)
    note("stuck done")

@dramatiq.actor(queue_name="{queue}")
def neighbour():
    note("neighbour begins")
    if runs("neighbour begins") == 1:
        for _ in range(360_000):
            time.sleep(0.01)
    note("neighbour done")
"""


@pytest.fixture
def application(place: Place, tmp_path: Path):
    one = Application(place, tmp_path)
    head, _, rest = one.module.read_text().partition("broker = ")
    made = rest.partition("\n")[0]
    notes = "journal = " + rest.partition("journal = ")[2].partition("@dramatiq.actor")[0]
    one.module.write_text(head + STUCK.format(broker=made, queue=place.queue) + notes)
    yield one
    one.close()


@pytest.mark.untraced
def test_the_jobs_of_a_process_that_ends_for_a_stuck_one_are_delivered_again(
    place: Place, application: Application
) -> None:
    application.send("neighbour")
    application.send("stuck")
    process = application.start()
    assert process.wait(30) == STUCK_EXIT_CODE, application.log.read_text()
    assert application.lines() == {"neighbour begins": 1, "stuck begins": 1}
    log = application.log.read_text()
    assert log.count("Job stuck (message") == 1
    assert "time.sleep(3600)" in log

    if isinstance(place, RedisPlace):
        put_back_what_a_dead_worker_held(place)
    process = application.start()
    application.wait_for("neighbour done", "stuck done")
    application.stop(process)
    assert application.lines() == {line: 2 if "begins" in line else 1 for line in application.lines()}
    assert place.left() == []
    assert place.dead() == []


def put_back_what_a_dead_worker_held(place: RedisPlace) -> None:
    """As the others do it when the process has been silent for heartbeat_timeout, a minute."""
    assert place.unacked() == 2
    broker = place.broker()
    broker.heartbeat_timeout, broker.maintenance_chance = 1, 1_000_000
    time.sleep(0.01)
    until(lambda: broker.do_requeue(place.queue) or place.ready() == 2)


# RabbitMQ's ``consumer_timeout`` is set for a whole node, and looked at once a minute. Its effect
# can be had at once: an ack of a tag that was never given makes the server close the channel with the same 406,
# PRECONDITION_FAILED, and requeues all that was not acknowledged.


def close_channel_from_the_server(app, place: RabbitmqPlace) -> None:
    assert app.worker is not None
    consumer = app.worker.consumers[place.queue].consumer
    inner = consumer.transport.inner
    inner.connection.add_callback_threadsafe(lambda: inner.channel.basic_ack(1_000_000))
    until(consumer.transport.is_revoked)


def test_a_job_whose_channel_the_server_closes_runs_once_and_its_redelivery_is_a_duplicate(
    rabbitmq_place: RabbitmqPlace, quick_restarts: None, caplog: pytest.LogCaptureFixture
) -> None:
    app = rabbitmq_place.app()
    gate = Gate()

    @app.actor
    def long() -> None:
        gate()

    message = long.send()
    with app.working(threads=2) as app.worker:
        assert gate.entered.wait(10)
        close_channel_from_the_server(app, rabbitmq_place)
        until(lambda: any("PRECONDITION_FAILED" in record.getMessage() for record in caplog.records))
        gate.open.set()
        app.wait_for("succeeded", "duplicate")
    assert [(event.outcome.value, event.message_id) for event in app.events] == [
        ("succeeded", message.message_id),
        ("duplicate", message.message_id),
    ]
    assert any("was lost before the acknowledgement" in record.getMessage() for record in caplog.records)
    assert rabbitmq_place.left() == []
    assert rabbitmq_place.dead() == []


def test_a_job_that_fails_after_the_server_closed_its_channel_runs_once_and_its_redelivery_is_dead(
    rabbitmq_place: RabbitmqPlace, quick_restarts: None
) -> None:
    app = rabbitmq_place.app()
    gate = Gate()

    @app.actor(max_retries=0)
    def long() -> None:
        gate()
        raise ValueError("once")

    message = long.send()
    with app.working(threads=2) as app.worker:
        assert gate.entered.wait(10)
        close_channel_from_the_server(app, rabbitmq_place)
        gate.open.set()
        app.wait_for("interrupted", "dead")
    assert app.outcomes == ["interrupted", "dead"]
    assert [letter.message_id for letter in rabbitmq_place.dead()] == [message.message_id]
    assert rabbitmq_place.left() == []


BLAMED = """
import os, pathlib, time
import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq_policies import Idempotency, Timeout, install

broker = RedisBroker(url=os.environ["APP_URL"], namespace={namespace!r}, heartbeat_timeout=1_000)
install(broker, timeout=Timeout(grace=100, on_stuck="exit"), idempotency=Idempotency(max_crashes=2))
dramatiq.set_broker(broker)
journal = pathlib.Path(os.environ["APP_JOURNAL"])

def note(line):
    with journal.open("a") as stream:
        stream.write(line + "\\n")

@dramatiq.actor(queue_name="{queue}", timeout=500)
def stuck():
    note("stuck begins")
    time.sleep(3600)

@dramatiq.actor(queue_name="{queue}", timeout=3_600_000)
def neighbour():
    note("neighbour begins")
    while journal.read_text().splitlines().count("neighbour begins") < 2:
        time.sleep(0.01)
    note("neighbour done")
"""


@pytest.mark.untraced
def test_the_quarantine_blames_the_stuck_job_and_not_its_neighbours(redis_place: RedisPlace, tmp_path: Path) -> None:
    application = Application(redis_place, tmp_path)
    application.module.write_text(BLAMED.format(namespace=redis_place.namespace, queue=redis_place.queue))
    try:
        application.send("neighbour")
        application.send("stuck")
        for _ in range(2):
            process = application.start()
            assert process.wait(60) == STUCK_EXIT_CODE, application.log.read_text()
        process = application.start()
        application.wait_for("neighbour done")
        until(redis_place.dead)
        application.stop(process)
    finally:
        application.close()
    assert application.lines() == {"stuck begins": 2, "neighbour begins": 2, "neighbour done": 1}
    (letter,) = redis_place.dead()
    assert (letter.actor_name, letter.options["failure"]["reason"]) == ("stuck", "crashed")
    assert redis_place.left() == []


def test_a_job_that_was_interrupted_while_it_sent_is_retried_and_sends_again(
    rabbitmq_place: RabbitmqPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frame whose writing was struck is never written, nor is any after it on that connection."""
    app = rabbitmq_place.app(broker=RabbitmqBroker(url=rabbitmq_place.url, confirm_delivery=True))
    write, used = SelectorIOServicesAdapter.set_writer, []

    def struck(self: Any, *args: Any) -> None:
        job = current_job(None)
        while job is not None and job.attempt == 1 and used:
            time.sleep(0.001)
        write(self, *args)

    @app.actor
    def other() -> None:
        pass

    @app.actor(timeout=1_000, retry_on={TimeoutExceeded: RetryPolicy(attempts=2, wait=constant(1))})
    def sends() -> None:
        connection = app.broker.channel.connection
        used.append(connection)
        other.send()

    monkeypatch.setattr(SelectorIOServicesAdapter, "set_writer", struck)
    sends.send()
    app.work_until("retried", "succeeded", "succeeded", threads=1)
    first, second = used
    assert first is not second
    assert app.broker.connections >= {second}
    assert first not in app.broker.connections
    assert rabbitmq_place.left() == []


def test_a_job_that_was_interrupted_between_a_command_and_its_answer_mixes_up_no_others(
    redis_place: RedisPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = redis_place.app()
    read, sending, answers = redis.Connection.read_response, [], []

    def struck(self: Any, *args: Any, **options: Any) -> Any:
        while sending and current_job(None) is not None:
            time.sleep(0.001)
        return read(self, *args, **options)

    @app.actor
    def other() -> None:
        pass

    @app.actor(timeout=300, max_retries=0)
    def sends() -> None:
        sending.append(True)
        try:
            other.send()
        finally:
            sending.clear()
            # Likely on the same connection: the pool gives out the latest first.
            answers.append(app.broker.client.echo("mine"))

    monkeypatch.setattr(redis.Connection, "read_response", struck)
    sends.send()
    with app.working(threads=1):
        app.wait_for("dead")
    assert answers == [b"mine"]
