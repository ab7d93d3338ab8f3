"""On a broker that is none of the three every rule works, and what can't be done is said once."""

from __future__ import annotations

import dataclasses
import logging
from queue import Empty, Queue

import dramatiq
import pytest
from dramatiq import Message, Worker
from dramatiq.broker import Broker, Consumer, MessageProxy
from dramatiq.brokers.stub import StubBroker
from dramatiq.common import dq_name
from dramatiq.errors import ConnectionClosed
from dramatiq.middleware import Pipelines

from dramatiq_policies import ConfigurationError, ErrorClassifier, Idempotency, QueueMonitor, RetryPolicy, install
from dramatiq_policies.delivery.broker_state import state_of
from dramatiq_policies.observability.election import Election
from dramatiq_policies.observability.fleet_election import elect

from ..support import PlainClient


class ListConsumer(Consumer):
    def __init__(self, broker, queue_name):
        self.broker = broker
        self.queue = broker.queues[queue_name]

    def __next__(self):
        try:
            return MessageProxy(Message.decode(self.queue.get(timeout=0.02)))
        except Empty:
            return None

    def ack(self, message):
        self.broker.acked.append(message.message_id)

    def nack(self, message):
        self.broker.nacked.append(message.message_id)


class ListBroker(Broker):
    """As small as a broker of somebody else's can be."""

    def __init__(self):
        super().__init__()
        self.acked, self.nacked = [], []

    def consume(self, queue_name, prefetch=1, timeout=30_000):
        return ListConsumer(self, queue_name)

    def declare_queue(self, queue_name):
        if queue_name not in self.queues:
            self.queues[queue_name] = Queue()
            self.emit_after("declare_queue", queue_name)
            self.queues[dq_name(queue_name)] = Queue()
            self.delay_queues.add(dq_name(queue_name))
            self.emit_after("declare_delay_queue", dq_name(queue_name))

    def enqueue(self, message, *, delay=None):
        queue_name = message.queue_name
        if delay is not None:
            queue_name = dq_name(queue_name)
            eta = dramatiq.common.current_millis() + delay
            message = message.copy(queue_name=queue_name, options={"eta": eta})
        self.emit_before("enqueue", message, delay)
        self.queues[queue_name].put(message.encode())
        self.emit_after("enqueue", message, delay)
        return message


def test_every_rule_works_and_a_dead_letter_without_a_reason_is_logged_once(caplog):
    caplog.set_level(logging.INFO, "dramatiq_policies")
    done = Queue()
    broker = install(ListBroker(), error_classifier=ErrorClassifier(on_outcome=done.put))

    @dramatiq.actor(
        broker=broker,
        retry_on={ValueError: RetryPolicy(attempts=2, wait=10)},
        discard_on=KeyError,
        alert_on=ConnectionError,
    )
    def job(error):
        if error is not None:
            raise {"value": ValueError, "key": KeyError, "connection": ConnectionError}[error]

    sent = {error: job.send(error).message_id for error in (None, "value", "key", "connection")}
    worker = Worker(broker, worker_timeout=20, worker_threads=1)
    worker.start()
    events = [done.get(timeout=10) for _ in range(5)]
    worker.stop()

    assert sorted(event.outcome.value for event in events) == ["alerted", "dead", "discarded", "retried", "succeeded"]
    assert set(broker.nacked) == {sent["value"], sent["connection"]}
    assert {sent[None], sent["key"]} < set(broker.acked)
    assert sum("carry no reason" in record.getMessage() for record in caplog.records) == 1


def working(broker, done, count):
    """Run a worker for ``count`` messages, and return their outcomes. All its threads must live at the end."""
    worker = Worker(broker, worker_timeout=20, worker_threads=1)
    worker.start()
    try:
        events = [done.get(timeout=10) for _ in range(count)]
        assert all(thread.is_alive() for thread in (*worker.workers, *worker.consumers.values()))
    finally:
        worker.stop()
    return events


def shop(broker, **rules):
    done = Queue()
    install(broker, error_classifier=ErrorClassifier(on_outcome=done.put, **rules))
    return done, dramatiq.actor(lambda: None, actor_name="job", broker=broker)


def test_a_message_of_the_wrong_shape_is_dead_and_the_next_one_runs():
    broker = ListBroker()
    done, job = shop(broker)
    wrong = job.message().copy()
    object.__setattr__(wrong, "options", [1])
    broker.queues["default"].put(wrong.encode())
    good = job.send()
    events = working(broker, done, 2)
    assert [(event.outcome, event.reason) for event in events] == [("dead", "malformed"), ("succeeded", None)]
    assert (broker.nacked, broker.acked) == ([wrong.message_id], [good.message_id])


def test_a_next_step_that_is_no_message_is_dead_and_the_next_message_runs():
    broker = ListBroker()
    done, job = shop(broker)
    wrong = job.send_with_options(pipe_target="nobody")
    job.send()
    events = working(broker, done, 2)
    assert [(event.outcome, event.reason) for event in events] == [("dead", "malformed"), ("succeeded", None)]
    assert broker.nacked == [wrong.message_id]


def test_an_ack_that_meets_a_lost_connection_is_tried_again(monkeypatch):
    monkeypatch.setattr("dramatiq.worker.POST_PROCESS_MESSAGE_RETRY_DELAY_SECS", 0.01)
    broker = ListBroker()
    done, job = shop(broker)
    errors = [OSError("cut"), ConnectionClosed(OSError("cut"))]
    stock = ListConsumer.ack

    def ack(self, message):
        if errors:
            raise errors.pop()
        stock(self, message)

    monkeypatch.setattr(ListConsumer, "ack", ack)
    first, second = job.send(), job.send()
    events = working(broker, done, 2)
    assert [event.outcome for event in events] == ["succeeded", "succeeded"]
    assert broker.acked == [first.message_id, second.message_id]


def test_a_consumer_that_loses_its_connection_is_started_again(monkeypatch):
    monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.01)
    broker = ListBroker()
    done, job = shop(broker)
    errors = [OSError("cut"), ConnectionClosed(OSError("cut"))]
    stock = ListConsumer.__next__

    def take(self):
        if errors and self.queue is broker.queues["default"]:
            raise errors.pop()
        return stock(self)

    monkeypatch.setattr(ListConsumer, "__next__", take)
    job.send()
    assert [event.outcome for event in working(broker, done, 1)] == ["succeeded"]


def test_a_due_message_that_can_not_be_moved_is_logged_and_tried_again(monkeypatch, caplog):
    monkeypatch.setattr("dramatiq_policies.delivery.moving_delayed.RETRY_AFTER", 10)
    broker = ListBroker()
    done, job = shop(broker)
    errors = [ValueError("too large")]
    stock = broker.enqueue

    def enqueue(message, *, delay=None):
        if errors and delay is None:
            raise errors.pop()
        return stock(message, delay=delay)

    monkeypatch.setattr(broker, "enqueue", enqueue)
    sent = job.send_with_options(delay=10)
    (event,) = working(broker, done, 1)
    assert (event.outcome, event.message_id) == ("succeeded", sent.message_id)
    assert f"Message {sent.message_id} is due and could not be moved out of 'default.DQ'" in caplog.text


def test_a_consumer_that_can_not_requeue_or_close_is_logged_and_the_worker_stops(monkeypatch, caplog):
    broker = ListBroker()
    done, job = shop(broker)

    def fails(*args):
        raise RuntimeError("gone")

    monkeypatch.setattr(ListConsumer, "requeue", fails)
    monkeypatch.setattr(ListConsumer, "close", fails)
    job.send()
    assert [event.outcome for event in working(broker, done, 1)] == ["succeeded"]
    assert "could not be requeued on queue 'default' (gone)" in caplog.text
    assert "The consumer of queue 'default' could not close cleanly: gone" in caplog.text


def test_a_proxy_keeps_its_own_fields_and_those_of_its_message(monkeypatch):
    asked, ran = [], Queue()
    monkeypatch.setattr(
        MessageProxy, "__getattr__", lambda self, name: asked.append(name) or getattr(self._message, name)
    )

    class Numbered(MessageProxy):
        def __init__(self, message):
            super().__init__(message)
            self.message_id = "seven"
            self.body = message.encode()

    class NumberedConsumer(ListConsumer):
        def __next__(self):
            message = super().__next__()
            return message and Numbered(message._message)

        def ack(self, message):
            assert Message.decode(message.body).actor_name == "job"
            super().ack(message)

    broker = ListBroker()
    broker.consume = lambda queue_name, **options: NumberedConsumer(broker, queue_name)
    install(broker, error_classifier=ErrorClassifier(on_outcome=ran.put))

    @dramatiq.actor(broker=broker)
    def job():
        pass

    job.send()
    worker = Worker(broker, worker_timeout=20, worker_threads=1)
    worker.start()
    ran.get(timeout=10)
    worker.stop()

    assert broker.acked == ["seven"]
    assert not {field.name for field in dataclasses.fields(Message)}.intersection(asked)


class Losing(ListConsumer):
    def ack(self, message):
        raise self.broker.error


class Wrapping(Broker):
    """Somebody's own around one of the three, which takes and hands out its messages."""

    def __init__(self, inner, client=None):
        super().__init__()
        self.inner = inner
        self.client = client

    def consume(self, queue_name, prefetch=1, timeout=30_000):
        return self.inner.consume(queue_name, prefetch, timeout)

    def declare_queue(self, queue_name):
        if queue_name not in self.queues:
            self.inner.declare_queue(queue_name)
            self.queues[queue_name] = self.inner.queues[queue_name]
            self.emit_after("declare_queue", queue_name)
            self.delay_queues.add(dq_name(queue_name))
            self.emit_after("declare_delay_queue", dq_name(queue_name))

    def enqueue(self, message, *, delay=None):
        return self.inner.enqueue(message, delay=delay)


def test_a_broker_that_has_one_of_the_three_inside_is_none_of_them(caplog):
    caplog.set_level(logging.INFO, "dramatiq_policies")
    broker = Wrapping(StubBroker(middleware=[]))
    done = Queue()
    install(broker, error_classifier=ErrorClassifier(on_outcome=done.put))

    @dramatiq.actor(broker=broker, retry_on={ValueError: RetryPolicy(attempts=2, wait=10)})
    def job(fails):
        if fails:
            raise ValueError

    job.send(True)
    job.send(False)
    events = working(broker, done, 3)
    assert sorted(event.outcome.value for event in events) == ["dead", "retried", "succeeded"]
    assert [letter.actor_name for letter in broker.inner.dead_letters] == ["job"]
    assert "Wrapping is an unknown broker type" in caplog.text


def test_a_subclass_of_one_of_the_three_is_that_one(caplog):
    caplog.set_level(logging.INFO, "dramatiq_policies")

    class OfTheHouse(StubBroker):
        pass

    broker = OfTheHouse()
    done, _ = shop(broker)
    fails = dramatiq.actor(lambda: 1 / 0, actor_name="fails", broker=broker, max_retries=0)
    fails.send()
    working(broker, done, 1)
    assert broker.dead_letters[0].options["failure"]["reason"] == "unclassified"
    assert "is not known" not in caplog.text


def test_the_client_of_an_unknown_broker_is_asked_for_no_lease(caplog):
    class Client:
        connection_pool = "of something else"

    election = elect(state_of(Wrapping(StubBroker(), Client())), 1_000)
    assert type(election) is Election
    assert caplog.records == []


def lose_acks(error):
    """A consumer of ours over one whose acks raise."""
    broker = ListBroker()
    broker.error = error
    broker.consume = lambda queue_name, **kwargs: Losing(broker, queue_name)
    install(broker)
    broker.declare_queue("default")
    return broker.consume("default")


def test_while_the_worker_stops_an_ack_that_is_lost_is_logged_and_the_message_left_for_redelivery(caplog):
    consumer = lose_acks(ConnectionClosed("gone"))
    consumer.state.stopping.set()
    consumer.ack(MessageProxy(Message("default", "job", (), {}, {}, message_id="m1")))
    assert "Message m1 of actor job could not be acknowledged and will be redelivered: gone" in caplog.text


def test_an_ack_that_fails_for_another_reason_than_the_connection_raises_it():
    with pytest.raises(ValueError, match="a fault of the broker's"):
        lose_acks(ValueError("a fault of the broker's")).ack(MessageProxy(Message("default", "job", (), {}, {})))


def test_a_message_that_no_consumer_of_ours_has_delivered_is_retried_by_dramatiq_s_own_code():
    """As where somebody calls the hooks: a test of theirs, or an in-process executor."""
    broker = install(ListBroker())
    told = []
    broker.add_middleware(Pipelines())

    @dramatiq.actor(broker=broker, max_retries=1, retry_on={ValueError: RetryPolicy(attempts=9, wait=1)})
    def job():
        pass

    def processed(message, **ended):
        proxy = MessageProxy(message)
        broker.emit_before("process_message", proxy)
        broker.emit_after("process_message", proxy, **ended)
        told.append(proxy.failed)

    processed(job.message(), exception=ValueError())
    retry = Message.decode(broker.queues["default.DQ"].get_nowait())
    assert retry.options["retries"] == 1
    assert "policies" not in retry.options
    processed(retry, exception=ValueError())
    processed(job.message().copy(options={"pipe_target": job.message().asdict()}), result=7)
    assert told == [False, True, False]
    assert Message.decode(broker.queues["default"].get_nowait()).args == (7,)
    broker.emit_after("skip_message", MessageProxy(job.message()))


def test_idempotency_without_a_store_names_the_missing_store_on_first_use():
    broker = ListBroker()
    broker.add_middleware(Idempotency())
    done = Queue()

    @dramatiq.actor(broker=broker)
    def job():
        done.put(1)

    job.send()
    worker = Worker(broker, worker_timeout=20, worker_threads=1)
    worker.start()
    assert done.get(timeout=20) == 1
    worker.stop()
    with pytest.raises(ConfigurationError, match="no Idempotency with a store"):
        Idempotency.state(job)


def test_a_queue_that_can_t_be_read_has_no_gauges():
    client = PlainClient()
    monitor = QueueMonitor(client=client)
    broker = install(ListBroker(), queue_monitor=monitor)
    broker.declare_queue("default")
    assert monitor.check() == []
    assert client.calls == []
