"""The wrapping consumer where nobody of ours has a say: other people's calls, and what is known of neither."""

from __future__ import annotations

import dramatiq
import pytest
from dramatiq import Message, Worker
from dramatiq.brokers.stub import StubBroker

from dramatiq_policies import ErrorClassifier, Metrics, current_job, install
from dramatiq_policies.delivery.broker_state import state_of
from dramatiq_policies.delivery.consumer import quiet
from dramatiq_policies.delivery.delivery import Delivery

from ..support import Collector, PlainClient, Stage


def work_off(broker):
    worker = Worker(broker, worker_timeout=50, worker_threads=1)
    worker.start()
    try:
        broker.join("default", timeout=20_000)
    finally:
        worker.stop()


def test_a_success_without_a_record_is_counted_once():
    client = PlainClient()
    broker = install(StubBroker(), metrics=Metrics(client))
    dramatiq.actor(lambda: None, actor_name="job", broker=broker).send()
    work_off(broker)
    assert [call for call in client.calls if call[0] == "c"] == [("c", "jobs.job.success", 1)]


def test_a_success_listener_that_fails_is_logged_and_the_message_is_acked(caplog):
    broker = install(StubBroker())
    told = []
    state_of(broker).outcomes.success_listeners = (lambda delivery: 1 / 0, told.append)
    dramatiq.actor(lambda: None, actor_name="job", broker=broker).send()
    work_off(broker)
    assert len(told) == 1
    assert "raised an error; the message is not affected" in caplog.text


def test_a_broker_without_notifications_of_a_shutdown_has_none():
    collected = Collector()
    broker = install(StubBroker(middleware=[]), error_classifier=ErrorClassifier(on_outcome=collected))
    dramatiq.actor(lambda: None, actor_name="job", broker=broker).send()
    work_off(broker)
    (event,) = collected.events
    assert event.outcome == "succeeded"


def test_a_message_that_our_consumer_has_given_no_delivery_is_nacked_by_dramatiq_s_own():
    """As one that somebody fails in `before_delay_message`, before it was ever on its queue."""
    stage = Stage()
    job = stage.actor(lambda: None, actor_name="job")
    job.send_with_options(delay=60_000)
    consumer = stage.broker.consume("default.DQ")
    message = next(consumer)
    consumer.nack(message)
    assert stage.broker.dead_letters == [message]
    assert stage.events == []


def test_a_message_sent_before_its_actor_was_declared_is_an_ordinary_message():
    collected = Collector()
    broker = StubBroker()
    broker.declare_queue("default")
    broker.add_middleware(ErrorClassifier(on_outcome=collected))
    broker.enqueue(Message("default", "job", (), {}, {}))
    dramatiq.actor(lambda: None, actor_name="job", broker=broker)
    work_off(broker)
    assert [event.outcome for event in collected.events] == ["succeeded"]
    assert collected.events[0].wait_ms is not None


def test_a_job_without_a_timeout_has_no_end_of_it_before_it():
    stage, left = Stage(), []
    stage.actor(lambda: left.append(current_job().remaining_ms()), actor_name="job", timeout=float("inf")).send()
    assert stage.run().outcomes() == ["succeeded"]
    assert left == [None]


def test_a_worker_is_held_whose_consumers_have_lost_their_connections():
    stage = Stage()
    stage.actor(lambda: None, actor_name="job")
    worker = Worker(stage.broker, worker_timeout=50, worker_threads=1)
    worker.start()
    try:
        worker.consumers["default.DQ"].consumer, lost = None, worker.consumers["default.DQ"].consumer
        quiet(worker)
        assert worker.consumers["default"].consumer.transport.is_quiet
    finally:
        worker.consumers["default.DQ"].consumer = lost
        worker.stop()


def test_follow_up_messages_keep_their_order():
    delivery = Delivery(None, Message("default", "job", (), {}, {}))
    delivery.add_follow_up(one := object())
    delivery.add_follow_up(other := object())
    assert delivery.follow_ups == [one, other]


def test_a_job_that_has_not_begun_has_run_for_no_time():
    assert Delivery(None, Message("default", "job", (), {}, {})).elapsed_ms() == 0.0


def test_an_argument_of_a_call_that_does_not_fit_the_actor_goes_by_its_number():
    job = Stage().actor(lambda order_id: None, actor_name="job")
    with pytest.raises(TypeError, match="The argument 'order_id' of a message for actor 'job' can't be encoded"):
        job.send(object())
    with pytest.raises(TypeError, match="The argument '1' of a message for actor 'job' can't be encoded"):
        job.send(7, object())
