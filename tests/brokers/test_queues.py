"""Reading queues: what a StubBroker holds, what a broker that is not known says, and the age from counts alone."""

from __future__ import annotations

import random

import dramatiq
import pytest
from dramatiq import Message
from dramatiq.broker import Broker
from dramatiq.brokers.stub import StubBroker

from dramatiq_policies.brokers import queue_reader as base
from dramatiq_policies.brokers.rabbitmq import queue_reader as rabbitmq
from dramatiq_policies.brokers.readers import QueueReading, reader_of
from dramatiq_policies.common.clock import now_ms

from ..support import Stage


@pytest.fixture
def stage():
    return Stage()


def test_a_stub_broker_s_queue_is_read_whole(stage):
    @stage.actor(queue_name="mail", max_retries=0)
    def send(fails=False):
        if fails:
            raise ValueError

    send.send(True)
    stage.run()
    for _ in range(3):
        send.send()
    send.send_with_options(delay=60_000)

    reading = reader_of(stage.broker).read("mail")
    assert (reading.queue, reading.ready, reading.delayed, reading.running, reading.dead) == ("mail", 3, 1, 0, 1)


def test_a_body_taken_meanwhile_or_unreadable_has_no_age(stage):
    job = stage.actor(lambda: None, actor_name="job")
    now = now_ms()
    old = job.message().copy(options={"ready_at": now - 5_000}).encode()
    assert base.oldest([None, b"rubbish", old.decode()], now) == 5_000
    assert base.oldest([None], now) == 0


def test_a_job_under_way_is_running(stage):
    reader, seen = reader_of(stage.broker), []

    @stage.actor(queue_name="mail")
    def look():
        seen.append(reader.read("mail"))

    look.send()
    stage.run()
    assert [(reading.ready, reading.running) for reading in seen] == [(0, 1)]
    assert reader.read("mail").running == 0


def test_the_age_counts_from_when_the_oldest_became_ready_wherever_it_lies(stage):
    @stage.actor(queue_name="mail")
    def send():
        pass

    send.send()
    stage.broker.queues["mail"].put(send.message().copy(options={"ready_at": now_ms() - 60_000}).encode())
    send.send()
    assert 60_000 <= reader_of(stage.broker).read("mail").oldest_ms < 65_000


def test_a_message_of_stock_dramatiq_is_as_old_as_its_timestamp():
    broker = StubBroker()
    broker.declare_queue("mail")
    message = dramatiq.Message("mail", "send", (), {}, {}, message_timestamp=now_ms() - 60_000)
    broker.enqueue(message)
    assert 60_000 <= reader_of(broker).read("mail").oldest_ms < 65_000


def test_a_body_that_can_t_be_read_has_no_age_and_breaks_nothing():
    broker = StubBroker()
    broker.declare_queue("mail")
    broker.queues["mail"].put(b"no message")
    reading = reader_of(broker).read("mail")
    assert (reading.ready, reading.oldest_ms) == (1, 0)


def test_a_delay_queue_s_name_reads_the_queue_itself_and_all_queues_are_named_once(stage):
    stage.broker.declare_queue("mail")
    reader = reader_of(stage.broker)
    assert reader.queues() == ["mail"]
    assert reader.read("mail.DQ").queue == "mail"
    assert [reading.queue for reading in reader.read_all()] == ["mail"]


def test_a_queue_is_stalled_while_its_front_message_stays_and_not_when_that_is_taken(stage, monkeypatch):
    @stage.actor(queue_name="mail")
    def send():
        pass

    clock = [now_ms()]
    monkeypatch.setattr(base, "now_ms", lambda: clock[0])
    reader = reader_of(stage.broker)

    def stalled(after):
        clock[0] += after
        return reader.read("mail").stalled_ms

    assert stalled(0) == 0
    send.send()
    assert [stalled(0), stalled(500), stalled(700)] == [0, 500, 1_200]
    send.send()
    assert stalled(100) == 1_300
    stage.broker.queues["mail"].get()
    assert [stalled(100), stalled(100)] == [0, 100]
    stage.broker.queues["mail"].get()
    assert stalled(100) == 0


def test_an_unknown_broker_has_no_reading_and_is_logged_once(caplog):
    class Elsewhere(Broker):
        def get_declared_queues(self):
            return {"mail"}

    reader = reader_of(Elsewhere())
    assert reader.read_all() == [QueueReading(queue="mail")]
    assert reader.read_all() == [QueueReading(queue="mail")]
    assert [record.name for record in caplog.records] == ["dramatiq_policies.alerts"]
    assert "Elsewhere" in caplog.text


class Fifo:
    """A queue of which only the count is seen, and its true age kept beside."""

    def __init__(self):
        self.now, self.waiting, self.age = 0, [], rabbitmq.AgeEstimate(0)

    def step(self, arrive, take, interval=10):
        self.now += interval
        self.waiting += [self.now] * arrive
        del self.waiting[:take]

    def read(self):
        self.age.observe(len(self.waiting), self.now)
        return self.age.after

    @property
    def oldest(self):
        return self.waiting[0] if self.waiting else self.now


def test_counts_alone_never_make_the_oldest_younger_than_it_is():
    choose = random.Random(6)
    for _ in range(50):
        queue = Fifo()
        for _ in range(200):
            for _ in range(choose.randrange(3)):
                queue.step(choose.randrange(4), choose.randrange(4))
            after = queue.read()
            assert after is None or after <= queue.oldest


def test_a_queue_seen_empty_is_no_older_than_that():
    queue = Fifo()
    queue.read()
    queue.step(arrive=3, take=0)
    queue.read()
    queue.step(arrive=3, take=0)
    assert queue.read() == 0


def test_the_messages_gone_since_bound_the_age_of_a_queue_that_is_never_empty():
    queue = Fifo()
    queue.step(arrive=10, take=0)
    queue.read()
    assert queue.age.after is None
    for _ in range(5):
        queue.step(arrive=2, take=0)
        queue.read()
        queue.step(arrive=0, take=2)
        queue.read()
    assert queue.age.after == 10


def test_a_long_life_does_not_grow_its_memory():
    queue = Fifo()
    for _ in range(10_000):
        queue.step(arrive=1, take=0)
        queue.read()
    assert len(queue.age._marks) <= rabbitmq.MARKS


def test_a_message_whose_time_is_none_has_no_age():
    bodies = [Message("mail", "send", (), {}, {}, message_timestamp=stamp).encode() for stamp in ("x", 4_000, None)]
    assert base.oldest(bodies, 5_000) == 1_000
    assert base.oldest(bodies[:1], 5_000) == 0
