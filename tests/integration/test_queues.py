"""Reading queues on real servers: counts and ages as they are, and nothing changed by reading."""

from __future__ import annotations

import time

import pytest
from dramatiq.errors import ConnectionClosed

from dramatiq_policies.brokers.readers import reader_of
from dramatiq_policies.common.clock import now_ms
from dramatiq_policies.delivery.broker_state import state_of
from tests.proxy import Proxy

from .places import Gate, Place, RabbitmqPlace, RedisPlace, lose_an_answer, soon, until


@pytest.fixture
def reading(place: Place):
    readers = []

    def start(broker):
        readers.append(reader_of(broker))
        return readers[-1]

    yield start
    for reader in readers:
        reader.close()


def test_every_count_is_read(place: Place, reading) -> None:
    app = place.app()

    @app.actor(max_retries=0)
    def job(fails: bool) -> None:
        if fails:
            raise ValueError

    job.send(True)
    app.work_until("dead")
    app.broker.close()
    for _ in range(3):
        job.send(False)
    job.send_with_options(args=(False,), delay=60_000)

    reader = reading(app.broker)
    seen = until(lambda: (found := reader.read(place.queue)).ready == 3 and found)
    assert (seen.queue, seen.ready, seen.delayed, seen.running, seen.dead) == (place.queue, 3, 1, 0, 1)


def test_a_queue_that_does_not_exist_yet_is_empty(place: Place, reading) -> None:
    seen = reading(place.broker()).read(place.queue)
    assert (seen.ready, seen.delayed, seen.running, seen.dead, seen.oldest_ms, seen.stalled_ms) == (0, 0, 0, 0, 0, 0)


def test_reading_changes_nothing(place: Place, reading) -> None:
    app = place.app()

    @app.actor
    def job() -> None:
        pass

    for _ in range(3):
        job.send()
    before = None
    if isinstance(place, RedisPlace):
        before = {key: place.client.dump(key) for key in place.client.scan_iter(match=place.key("*"), count=5_000)}
    reader = reading(app.broker)
    for _ in range(30):
        reader.read(place.queue)
    if isinstance(place, RedisPlace):
        assert before == {
            key: place.client.dump(key) for key in place.client.scan_iter(match=place.key("*"), count=5_000)
        }
    else:
        got = [place.channel.basic_get(place.queue, auto_ack=True) for _ in range(3)]
        assert [method.redelivered for method, _, _ in got] == [False] * 3


def test_a_reader_goes_on_after_its_connection_was_lost(place: Place, reading) -> None:
    with Proxy.before(place.url) as proxy:
        app = place.app(proxy.url)

        @app.actor
        def job() -> None:
            pass

        job.send()
        reader = reading(app.broker)
        assert until(lambda: reader.read(place.queue).ready) == 1
        assert proxy.cut() > 0
        assert reader.read(place.queue).ready == 1
        reader.close()
        app.broker.close()


def test_a_reading_that_is_interrupted_in_the_middle_of_a_conversation_is_followed_by_others(
    rabbitmq_place: RabbitmqPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = reader_of(rabbitmq_place.broker())
    lose_an_answer(monkeypatch, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        soon(lambda: reader.read(rabbitmq_place.queue))
    assert soon(lambda: reader.read(rabbitmq_place.queue)).ready == 0
    soon(reader.close)


def test_a_server_that_is_not_there_is_a_lost_connection(place: Place, reading) -> None:
    scheme, _, _ = place.url.partition("://")
    reader = reading(place.broker(f"{scheme}://127.0.0.1:1"))
    with pytest.raises(ConnectionClosed):
        reader.read(place.queue)


@pytest.mark.parametrize("several", [list, tuple])
def test_a_broker_of_several_rabbitmq_servers_is_read(rabbitmq_place: RabbitmqPlace, several: type) -> None:
    broker = rabbitmq_place.broker()
    broker.declare_queue(rabbitmq_place.queue, ensure=True)
    broker.parameters = several([broker.parameters])
    reader = reader_of(broker)
    assert reader.read(rabbitmq_place.queue).ready == 0
    reader.close()


def test_messages_without_a_consumer_are_stalled(place: Place, reading) -> None:
    app = place.app()

    @app.actor
    def job() -> None:
        pass

    job.send()
    job.send()
    reader = reading(app.broker)
    assert until(lambda: (seen := reader.read(place.queue)).ready == 2 and seen).stalled_ms is not None
    time.sleep(0.2)
    assert reader.read(place.queue).stalled_ms >= 200
    with app.working():
        app.wait_for("succeeded", "succeeded")
    assert reader.read(place.queue).stalled_ms == 0


def test_on_redis_the_age_is_that_of_the_oldest_message_and_jobs_under_way_are_running(
    redis_place: RedisPlace,
) -> None:
    app, gate = redis_place.app(), Gate()

    @app.actor
    def job() -> None:
        gate()

    reader = reader_of(app.broker)
    job.send()
    with app.working(threads=1):
        assert gate.entered.wait(10)
        for _ in range(4):
            job.send()
        seen = reader.read(redis_place.queue)
        assert seen.running >= 1
        assert seen.ready + seen.running == 5
        gate.open.set()
        app.wait_for(*["succeeded"] * 5)
    redis_place.push(job.message().copy(options={"ready_at": now_ms() - 60_000}).encode())
    job.send()
    assert 60_000 <= reader.read(redis_place.queue).oldest_ms < 70_000
    reader.close()


def test_on_rabbitmq_the_age_follows_the_message_taken_last_and_the_empty_queue(rabbitmq_place: RabbitmqPlace) -> None:
    app, gate = rabbitmq_place.app(), Gate()

    @app.actor
    def job() -> None:
        gate()

    def push_old() -> None:
        rabbitmq_place.push(job.message().copy(options={"ready_at": now_ms() - 60_000}).encode())

    state_of(app.broker).last_received = {}
    reader = reader_of(app.broker)
    # One runs, one more is fetched ahead, and the rest wait in the queue.
    app.broker.declare_queue(rabbitmq_place.queue, ensure=True)
    for _ in range(4):
        push_old()
    with app.working(threads=1):
        assert gate.entered.wait(10)
        seen = until(lambda: (found := reader.read(rabbitmq_place.queue)).ready == 2 and found)
        assert seen.running == 2
        assert 60_000 <= seen.oldest_ms < 70_000
        gate.open.set()
        app.wait_for(*["succeeded"] * 4)
        assert until(lambda: (found := reader.read(rabbitmq_place.queue)).ready == 0 and found).oldest_ms == 0
    app.broker.close()
    # It says it is older than the last look at an empty queue: it was requeued, or its sender's clock is wrong.
    push_old()
    assert until(lambda: (found := reader.read(rabbitmq_place.queue)).ready == 1 and found).oldest_ms < 20_000
    reader.close()


def test_on_rabbitmq_a_reader_alone_knows_no_age_at_first_and_then_for_how_long_it_has_seen_messages_wait(
    rabbitmq_place: RabbitmqPlace,
) -> None:
    app = rabbitmq_place.app()

    @app.actor
    def job() -> None:
        pass

    job.send()
    until(lambda: rabbitmq_place.ready() == 1)
    reader = reader_of(app.broker)
    assert reader.read(rabbitmq_place.queue).oldest_ms is None
    time.sleep(0.1)
    assert reader.read(rabbitmq_place.queue).oldest_ms >= 100
    reader.close()


def test_messages_taken_by_other_processes_count_on_rabbitmq_too(rabbitmq_place: RabbitmqPlace) -> None:
    app = rabbitmq_place.app()

    @app.actor
    def job() -> None:
        pass

    job.send()
    until(lambda: rabbitmq_place.ready() == 1)

    def taken(queue: str, message_id: str, ready: int) -> dict:
        return {"taken": {queue: [message_id, ready]}, "held": {}}

    reader = reader_of(app.broker)
    queue, now = rabbitmq_place.queue, now_ms()
    reader.peer_reports = [taken(queue, "first", now - 60_000), taken("other", "second", now - 1_000)]
    seen = reader.read(queue)
    assert 60_000 <= seen.oldest_ms < 65_000
    time.sleep(0.05)
    assert reader.read(queue).stalled_ms >= 50
    reader.peer_reports = [taken(queue, "third", now - 10_000)]
    seen = reader.read(queue)
    assert 10_000 <= seen.oldest_ms < 15_000
    assert seen.stalled_ms == 0
    reader.close()


def test_messages_held_by_workers_count_on_rabbitmq_as_far_as_reported(rabbitmq_place: RabbitmqPlace) -> None:
    here, elsewhere, gate = rabbitmq_place.app(), rabbitmq_place.app(), Gate()

    @here.actor
    def job() -> None:
        gate()

    elsewhere.broker.declare_actor(job)
    readers = [reader_of(app.broker) for app in (here, elsewhere)]
    with here.working(threads=1):
        for _ in range(3):
            job.send_with_options(delay=60_000)
        job.send()
        assert gate.entered.wait(10)
        seen = until(lambda: (found := readers[0].read(rabbitmq_place.queue)).delayed == 3 and found)
        assert seen.running == 1
        # They are in the hands of the worker, of whom this one has not heard.
        seen = until(lambda: (found := readers[1].read(rabbitmq_place.queue)).delayed == 0 and found)
        assert seen.running is None
        readers[1].peer_reports = [readers[0].report(), readers[1].report()]
        seen = readers[1].read(rabbitmq_place.queue)
        assert (seen.delayed, seen.running) == (3, 1)
        gate.open.set()
        here.wait_for("succeeded")
        assert until(lambda: (found := readers[0].read(rabbitmq_place.queue)).running == 0 and found).delayed == 3
    here.broker.close()
    assert until(lambda: (found := readers[1].read(rabbitmq_place.queue)).running == 0 and found).delayed == 3
    for reader in readers:
        reader.close()
