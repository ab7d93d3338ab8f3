"""Many messages are published at once: what the broker refuses stops no other, and a lost connection loses nothing."""

from __future__ import annotations

import uuid

import dramatiq
import pika
import pytest
from dramatiq import Message
from dramatiq.broker import Broker
from dramatiq.errors import ConnectionClosed

from dramatiq_policies import install
from dramatiq_policies.brokers import batch_of
from dramatiq_policies.brokers.batch import Encoded
from dramatiq_policies.delivery.broker_state import state_of
from tests.proxy import Proxy, amqp_method

from .places import RabbitmqPlace, RedisPlace

pytestmark = pytest.mark.usefixtures("quick_restarts")

CONFIRM = amqp_method(60, 80)


def batch_on(place, url=None):
    broker = install(place.broker(url))
    dramatiq.actor(print, broker=broker, actor_name="job", queue_name=place.queue)
    return batch_of(state_of(broker))


def encoded(batch, number, delay=None, queue=None, **options):
    place_queue = next(iter(batch.broker.get_declared_queues()))
    message = batch.prepare(Message(queue or place_queue, "job", (number,), {}, options), delay)
    return Encoded(message, message.encode())


def arguments(place):
    return sorted(message.args[0] for message in place.left())


def test_all_messages_arrive_delayed_ones_on_the_delay_queue(place):
    batch = batch_on(place)
    messages = [encoded(batch, number) for number in range(250)] + [encoded(batch, 250, delay=60_000)]
    assert batch.publish(messages) == [None] * 251
    found = place.left()
    assert sorted(message.args[0] for message in found) == list(range(251))
    assert [message.args[0] for message in found if message.queue_name.endswith(".DQ")] == [250]


def test_large_messages_are_split_over_calls(place):
    batch = batch_on(place)
    messages = [encoded(batch, "x" * 400_000) for _ in range(6)]
    assert batch.publish(messages) == [None] * 6
    assert len(place.left()) == 6


def test_an_idle_connection_that_was_closed_is_no_obstacle(place):
    with Proxy.before(place.url) as proxy:
        batch = batch_on(place, proxy.url)
        assert batch.publish([encoded(batch, 1)]) == [None]
        proxy.cut()
        assert batch.publish([encoded(batch, 2), encoded(batch, 3)]) == [None, None]
    assert arguments(place) == [1, 2, 3]


def test_a_batch_whose_reply_was_lost_is_sent_again(place):
    with Proxy.before(place.url) as proxy:
        batch = batch_on(place, proxy.url)
        assert batch.publish([encoded(batch, 0)]) == [None]
        if isinstance(place, RedisPlace):
            proxy.cut_when(b"EVALSHA", after=True)
        else:
            proxy.cut_when(CONFIRM)
        assert batch.publish([encoded(batch, 1), encoded(batch, 2)]) == [None, None]
    # Redis takes the second ones for the first. On RabbitMQ there may be two of each, never none.
    found = arguments(place)
    assert set(found) == {0, 1, 2}
    assert isinstance(place, RabbitmqPlace) or found == [0, 1, 2]


def test_a_broker_that_is_down_differs_from_one_that_refuses(place):
    with Proxy.before(place.url) as proxy:
        batch = batch_on(place, proxy.url)
        batch.publish([encoded(batch, 0)])
        messages = [encoded(batch, 1), encoded(batch, 2)]
        proxy.refuse()
        proxy.cut()
        results = batch.publish(messages)
        assert all(isinstance(result, ConnectionClosed) for result in results)
        proxy.accept()
        assert batch.publish(messages) == [None, None]
    assert arguments(place) == [0, 1, 2]


def test_a_frozen_rabbitmq_counts_as_down_after_a_while(rabbitmq_place, monkeypatch):
    monkeypatch.setattr("dramatiq_policies.brokers.rabbitmq.batch._CONFIRM_WITHIN", 0.5)
    with Proxy.before(rabbitmq_place.url) as proxy:
        batch = batch_on(rabbitmq_place, proxy.url)
        batch.publish([encoded(batch, 0)])
        proxy.stall("to_client")
        (result,) = batch.publish([encoded(batch, 1)])
        assert isinstance(result, ConnectionClosed)
        proxy.resume()


@pytest.fixture
def taken_queue(place):
    """A queue that takes nothing."""
    queue = f"dp-test-{uuid.uuid4().hex}"
    if isinstance(place, RedisPlace):
        place.client.set(place.key(queue), "of another type")
    else:
        place.channel.queue_declare(queue, durable=True, arguments={"x-max-length": 1})
    yield queue
    if isinstance(place, RabbitmqPlace):
        with pika.BlockingConnection(pika.URLParameters(place.url)) as connection:
            connection.channel().queue_delete(queue)


def test_a_queue_that_refuses_stops_no_other(place, taken_queue):
    batch = batch_on(place)
    messages = [encoded(batch, 1), encoded(batch, 2, queue=taken_queue), encoded(batch, 3)]
    first, refused, last = batch.publish(messages)
    assert (first, last) == (None, None)
    assert "WRONGTYPE" in str(refused) or "PRECONDITION_FAILED" in str(refused)
    assert not isinstance(refused, ConnectionClosed)
    if isinstance(place, RedisPlace):
        assert place.client.hlen(place.key(f"{taken_queue}.msgs")) == 0
    assert arguments(place) == [1, 3]


def test_a_message_that_amqp_cannot_carry_stops_no_other(rabbitmq_place):
    batch = batch_on(rabbitmq_place)
    messages = [encoded(batch, 1), encoded(batch, 2, broker_priority=1_000), encoded(batch, 3)]
    first, refused, last = batch.publish(messages)
    assert (first, last) == (None, None)
    assert isinstance(refused, RuntimeError)
    assert arguments(rabbitmq_place) == [1, 3]


def test_a_message_for_which_rabbitmq_closes_the_channel_stops_no_other(rabbitmq_place, monkeypatch):
    # As the server does for a message above its max_message_size.
    properties = pika.BasicProperties

    def of_another_user(priority, **others):
        return properties(priority=priority, user_id="nobody" if priority == 9 else None, **others)

    monkeypatch.setattr("pika.BasicProperties", of_another_user)
    batch = batch_on(rabbitmq_place)
    messages = [encoded(batch, 1), encoded(batch, 2, broker_priority=9), encoded(batch, 3)]
    first, refused, last = batch.publish(messages)
    assert (first, last) == (None, None)
    assert isinstance(refused, pika.exceptions.ChannelClosedByBroker)
    # The first may have arrived twice: the server confirms nothing after it has closed the channel.
    assert set(arguments(rabbitmq_place)) == {1, 3}


def test_a_queue_that_has_disappeared_is_declared_again(rabbitmq_place):
    batch = batch_on(rabbitmq_place)
    batch.publish([encoded(batch, 1)])
    rabbitmq_place.channel.queue_delete(rabbitmq_place.queue)
    assert batch.publish([encoded(batch, 2), encoded(batch, 3)]) == [None, None]
    assert batch.publish([encoded(batch, 4)]) == [None]
    rabbitmq_place.channel.queue_delete(rabbitmq_place.queue)
    assert batch.publish([encoded(batch, 5)]) == [None]
    assert arguments(rabbitmq_place) == [5]


def test_an_idle_thread_keeps_its_connection(rabbitmq_place):
    batch = batch_on(rabbitmq_place)
    batch.serve()
    batch.publish([encoded(batch, 1)])
    connection = batch.broker.connection
    batch.serve()
    assert batch.broker.connection is connection
    batch.close()
    assert not connection.is_open


def test_a_full_redis_counts_as_down(redis_place, monkeypatch):
    batch = batch_on(redis_place)
    answers = iter([[b"OOM command not allowed when used memory > 'maxmemory'."], [b""]])
    monkeypatch.setattr(batch, "_call", lambda args: next(answers))
    message = encoded(batch, 1)
    assert isinstance(batch.publish([message])[0], ConnectionClosed)
    assert batch.publish([message]) == [None]


class OtherBroker(Broker):
    """Of a kind that nobody knows."""

    def __init__(self):
        super().__init__(middleware=[])
        self.sent = []
        self.error = None

    def declare_queue(self, queue_name):
        self.queues[queue_name] = None

    def enqueue(self, message, *, delay=None):
        if self.error is not None:
            raise self.error
        self.sent.append((message, delay))
        return message


def test_a_broker_of_another_kind_enqueues_one_by_one():
    broker = OtherBroker()
    broker.declare_queue("mail")
    batch = batch_of(state_of(broker))
    one, later = encoded(batch, 1), encoded(batch, 2, delay=60_000)
    assert batch.publish([one, later]) == [None, None]
    (_, no_delay), (_, delay) = broker.sent
    assert no_delay is None
    assert 50_000 < delay <= 60_000
    broker.error = ValueError("refused")
    assert batch.publish([one]) == [broker.error]
    broker.error = OSError("down")
    assert all(isinstance(result, ConnectionClosed) for result in batch.publish([one, later]))
