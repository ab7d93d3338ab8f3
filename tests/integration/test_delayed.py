"""Delayed messages on real servers: nearer ones run on time, however many far ones wait, and none is lost or doubled."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import dramatiq
import pika.exceptions
import pytest
import redis
from dramatiq import Message, Worker
from dramatiq import worker as dramatiq_worker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.common import current_millis
from dramatiq.middleware import Middleware, MiddlewareError

from dramatiq_policies import RetryPolicy
from dramatiq_policies.brokers.rabbitmq import delayed as rabbitmq_delayed
from dramatiq_policies.brokers.rabbitmq.acks import SharedAcks, UnackedCounts
from dramatiq_policies.brokers.redis.delay_index import DelayIndex
from dramatiq_policies.delivery import moving_delayed
from dramatiq_policies.delivery.broker_state import state_of

from .places import App, Place, RabbitmqPlace, RedisPlace, until

pytestmark = pytest.mark.usefixtures("quick_restarts")

HOUR = 3_600_000
#: How many delayed messages a worker holds in these tests.
IN_HAND = 100


@pytest.fixture(autouse=True)
def few_in_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dramatiq_worker, "DELAY_QUEUE_PREFETCH", IN_HAND)


def send_far(app: App, count: int) -> Any:
    far = app.actor(lambda number: None, actor_name="far")
    for number in range(count):
        far.send_with_options(args=(number,), delay=HOUR + number)
    return far


def in_hand(worker: Worker, place: Place) -> int:
    return worker.consumers[f"{place.queue}.DQ"].delay_queue.qsize()


def test_a_nearer_message_runs_on_time_behind_far_ones(place: Place) -> None:
    app = place.app()
    send_far(app, 4 * IN_HAND)
    late: list[int] = []

    @app.actor
    def near(due):
        late.append(current_millis() - due)

    with app.working(1) as worker:
        until(lambda: in_hand(worker, place) >= IN_HAND // 2)
        for _ in range(3):
            near.send_with_options(args=(current_millis() + 300,), delay=300)
        app.wait_for(*["succeeded"] * 3)
    assert max(late) < 15_000, late
    assert len(place.left()) == 4 * IN_HAND


def test_retries_run_on_time_behind_far_messages(place: Place) -> None:
    app = place.app()
    send_far(app, 3 * IN_HAND)

    @app.actor(retry_on={ValueError: RetryPolicy(attempts=3, wait=200)})
    def flaky():
        raise ValueError

    with app.working(1):
        flaky.send()
        app.wait_for("retried", "retried", "dead")
    assert len(place.left()) == 3 * IN_HAND


def test_many_messages_in_any_order_run_once_each_and_none_before_its_time(place: Place) -> None:
    app = place.app()
    early: list[int] = []
    done: Counter[int] = Counter()

    @app.actor
    def job(number, due):
        done[number] += 1
        if (ahead := due - current_millis()) > 0:
            early.append(ahead)

    for number in range(6 * IN_HAND):
        delay = 200 + number * 37 % 1_500
        job.send_with_options(args=(number, current_millis() + delay), delay=delay)
    with app.working(2):
        app.wait_for(*["succeeded"] * 6 * IN_HAND)
    assert early == []
    assert done == dict.fromkeys(range(6 * IN_HAND), 1)
    assert place.left() == []


def test_a_worker_holds_few_of_many_delayed_messages(place: Place) -> None:
    app = place.app()
    send_far(app, 6 * IN_HAND)
    with app.working(1) as worker:
        until(lambda: in_hand(worker, place) >= IN_HAND // 2)
        seen = [in_hand(worker, place) for _ in range(200) if time.sleep(0.01) is None]
    assert max(seen) <= IN_HAND


class Refusal(MiddlewareError):
    pass


class Refuses(Middleware):
    """Lets the first move of one message fail."""

    def __init__(self, message_id: str) -> None:
        self.message_id = message_id
        self.refused = 0

    def before_enqueue(self, broker: Any, message: Message[Any], delay: int | None) -> None:
        if message.message_id == self.message_id and delay is None and not self.refused:
            self.refused += 1
            raise Refusal("not now")


def test_a_move_that_fails_delays_its_own_message_only(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(moving_delayed, "RETRY_AFTER", 200)
    app = place.app()
    ran: list[int] = []
    job = app.actor(ran.append, actor_name="job")
    messages = [job.send_with_options(args=(number,), delay=100) for number in range(20)]
    refuses = Refuses(messages[7].message_id)
    app.broker.add_middleware(refuses)
    with app.working(1):
        app.wait_for(*["succeeded"] * 20)
    assert sorted(ran) == list(range(20))
    assert refuses.refused == 1
    assert ran[-1] == 7
    assert "could not be moved" in caplog.text
    assert place.left() == []


class Spoils(Middleware):
    """Puts into one message, when it is moved, a value that cannot be encoded."""

    def __init__(self, message_id: str) -> None:
        self.message_id = message_id

    def before_enqueue(self, broker: Any, message: Message[Any], delay: int | None) -> None:
        if message.message_id == self.message_id and delay is None:
            message.options["spoilt"] = object()


def test_a_message_that_can_never_be_moved_is_dead_and_the_others_run(place: Place) -> None:
    app = place.app()
    ran: list[int] = []
    job = app.actor(ran.append, actor_name="job")
    messages = [job.send_with_options(args=(number,), delay=100) for number in range(5)]
    app.broker.add_middleware(Spoils(messages[2].message_id))
    with app.working(1):
        app.wait_for(*["succeeded"] * 4, "dead")
        until(place.dead_bodies)
    (dead,) = place.dead()
    assert dead.message_id == messages[2].message_id
    assert sorted(ran) == [0, 1, 3, 4]
    assert [event.reason for event in app.events if event.outcome == "dead"] == ["handoff_failed"]
    assert place.left() == []


# RabbitMQ: of the far ones a worker keeps only the tag.


def test_a_batch_that_was_published_and_not_acked_is_all_that_runs_twice(
    rabbitmq_place: RabbitmqPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = rabbitmq_place.app()
    done: Counter[int] = Counter()

    @app.actor
    def job(number):
        done[number] += 1

    for number in range(500):
        job.send_with_options(args=(number,), delay=1_000)
    send, calls = SharedAcks.send, [0]

    def break_down(acks: SharedAcks, tags: list[int]) -> None:
        calls[0] += bool(tags)
        if calls[0] == 3:
            raise pika.exceptions.ConnectionWrongStateError("the connection is lost")
        send(acks, tags)

    monkeypatch.setattr(SharedAcks, "send", break_down)
    with app.working(1):
        until(lambda: len(done) == 500 and rabbitmq_place.ready() == 0 and calls[0] > 3, describe=lambda: len(done))
        until(lambda: app.in_hand() == 0)
    assert sum(done.values()) - 500 <= moving_delayed.BATCH
    assert rabbitmq_place.left() == []


def test_a_nearer_message_runs_on_time_behind_far_ones_in_a_quorum_queue(rabbitmq_place: RabbitmqPlace) -> None:
    """To a quorum queue a consumer without a limit is one that holds 2,000."""
    broker = rabbitmq_place.broker()
    stock = broker._build_queue_arguments
    broker._build_queue_arguments = lambda name: {**stock(name), "x-queue-type": "quorum"}
    app = rabbitmq_place.app(broker=broker)
    ran: list[int] = []
    near = app.actor(ran.append, actor_name="near")
    send_far(app, 2_100)
    with app.working(1):
        held = state_of(app.broker).shared(UnackedCounts).by_queue
        until(lambda: held.get(f"{rabbitmq_place.queue}.DQ", int)() == 2_100)
        near.send_with_options(args=(1,), delay=200)
        app.wait_for("succeeded")
    assert ran == [1]


def test_due_messages_whose_queue_was_deleted_are_moved_to_one_declared_again(rabbitmq_place: RabbitmqPlace) -> None:
    app = rabbitmq_place.app()
    ran: list[int] = []
    job = app.actor(ran.append, actor_name="job")
    for number in range(30):
        job.send_with_options(args=(number,), delay=1_500)
    with app.working(1) as worker:
        until(lambda: in_hand(worker, rabbitmq_place) == 30)
        rabbitmq_place.channel.queue_delete(rabbitmq_place.queue)
        until(lambda: sorted(ran) == list(range(30)), describe=lambda: ran)
    assert rabbitmq_place.left() == []


def test_a_message_held_without_its_body_counts_as_delayed(rabbitmq_place: RabbitmqPlace) -> None:
    app = rabbitmq_place.app()
    send_far(app, 4 * IN_HAND)
    with app.working(1):
        held = state_of(app.broker).shared(UnackedCounts).by_queue
        until(lambda: held.get(f"{rabbitmq_place.queue}.DQ", int)() == 4 * IN_HAND)
    assert len(rabbitmq_place.left()) == 4 * IN_HAND


def test_a_worker_that_idles_longer_than_its_heartbeats_moves_on_the_same_connection(
    rabbitmq_place: RabbitmqPlace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rabbitmq_delayed, "_SERVE_EVERY", 0.2)
    app = rabbitmq_place.app(f"{rabbitmq_place.url}?heartbeat=1")
    ran: list[int] = []
    job = app.actor(ran.append, actor_name="job")
    with app.working(1):
        app.place.broker().enqueue(job.message(1), delay=200)
        until(lambda: ran == [1])
        moved = worker_connections(app)
        time.sleep(5)
        app.place.broker().enqueue(job.message(2), delay=200)
        until(lambda: ran == [1, 2])
        assert worker_connections(app) == moved
    assert "connection error" not in caplog.text


def worker_connections(app: App) -> set[Any]:
    return {connection for connection in app.broker.connections if connection.is_open}


# Redis: the far ones lie in an index.


def index_of(place: RedisPlace) -> int:
    return place.client.zcard(place.key(f"__delayed__.{place.queue}.DQ"))


def test_any_worker_runs_the_messages_that_another_has_left_to_the_index(redis_place: RedisPlace) -> None:
    killed, other = redis_place.app(), redis_place.app()
    ran = []
    for app in (killed, other):
        app.actor(ran.append, actor_name="job")
    message = killed.broker.actors["job"].send_with_options(args=(1,), delay=1_000)
    leave_to_index(killed, message)
    with other.working(1):
        other.wait_for("succeeded")
    assert ran == [1]
    assert redis_place.left() == []


def leave_to_index(app: App, *messages: Message[Any]) -> None:
    """As a worker does that is then killed."""
    consumer = app.broker.consume(f"{app.place.queue}.DQ", prefetch=100, timeout=100)
    for _ in messages:
        until(lambda: next(consumer))
    ids = [message.options["redis_message_id"] for message in messages]
    consumer.transport.index.add(
        [(redis_id, message.options["eta"]) for redis_id, message in zip(ids, messages, strict=True)]
    )
    # Whoever is killed has no time to put anything back.
    for redis_id in ids:
        consumer.transport.window.release(redis_id)


def test_the_last_worker_that_stops_puts_all_back_for_workers_that_know_no_index(redis_place: RedisPlace) -> None:
    app = redis_place.app()
    send_far(app, 4 * IN_HAND)
    with app.working(1):
        until(lambda: index_of(redis_place) >= 2 * IN_HAND)
    assert redis_place.client.llen(redis_place.key(f"{redis_place.queue}.DQ")) == 4 * IN_HAND
    assert not list(redis_place.client.scan_iter(match=redis_place.key("__delayed__*"), count=5_000))
    assert redis_place.unacked() == 0


def test_a_worker_that_stops_beside_another_leaves_the_index_as_it_is(redis_place: RedisPlace) -> None:
    leaving, staying = redis_place.app(), redis_place.app()
    for app in (leaving, staying):
        app.actor(lambda number: None, actor_name="far")
    with staying.working(1):
        with leaving.working(1):
            for number in range(4 * IN_HAND):
                leaving.broker.actors["far"].send_with_options(args=(number,), delay=HOUR)
            users = redis_place.key(f"__delayed__.{redis_place.queue}.DQ.workers")
            until(lambda: index_of(redis_place) >= IN_HAND and redis_place.client.zcard(users) == 2)
        assert index_of(redis_place) >= IN_HAND
        assert redis_place.client.zrange(users, 0, -1) == [staying.broker.broker_id.encode()]
    assert len(redis_place.left()) == 4 * IN_HAND


def test_plain_dramatiq_brings_the_index_back_when_all_workers_that_know_it_were_killed(
    redis_place: RedisPlace,
) -> None:
    app = redis_place.app()
    far = app.actor(lambda: None, actor_name="far")
    messages = [far.send_with_options(delay=HOUR) for _ in range(3)]
    leave_to_index(app, *messages)
    stock = RedisBroker(
        url=redis_place.url, namespace=redis_place.namespace, maintenance_chance=1_000_000, heartbeat_timeout=1
    )
    fetched: list[bytes] = []
    until(lambda: fetched.extend(stock.do_fetch(f"{redis_place.queue}.DQ", 10)) or len(fetched) == 3)
    assert {Message.decode(body).message_id for body in fetched} == {message.message_id for message in messages}
    stock.close()


def test_a_message_whose_reply_from_the_index_was_lost_runs_once(
    redis_place: RedisPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = redis_place.app()
    send_far(app, 3 * IN_HAND)
    ran: list[int] = []
    near = app.actor(ran.append, actor_name="near")
    for number in range(2 * IN_HAND):
        near.send_with_options(args=(number,), delay=2_000)
    lose_replies(monkeypatch, "add", "fetch")
    with app.working(1):
        app.wait_for(*["succeeded"] * 2 * IN_HAND)
        assert sorted(ran) == list(range(2 * IN_HAND))
    assert len(redis_place.left()) == 3 * IN_HAND


def lose_replies(monkeypatch: pytest.MonkeyPatch, *commands: str) -> None:
    """Once of each of these commands: it is carried out, and its answer never comes."""
    run, left = DelayIndex._run, list(commands)

    def losing(index: DelayIndex, command: str, *args: Any) -> Any:
        answer = run(index, command, *args)
        if command in left and (command != "fetch" or len(answer) > 1):
            left.remove(command)
            raise redis.ConnectionError("the reply is lost")
        return answer

    monkeypatch.setattr(DelayIndex, "_run", losing)


def test_a_message_flushed_out_of_the_index_never_runs(redis_place: RedisPlace) -> None:
    app = redis_place.app()
    ran: list[int] = []
    job = app.actor(ran.append, actor_name="job")
    leave_to_index(app, job.send_with_options(args=(1,), delay=500))
    app.broker.flush(redis_place.queue)
    job.send_with_options(args=(2,), delay=1_000)
    with app.working(1):
        app.wait_for("succeeded")
    assert ran == [2]
    assert index_of(redis_place) == 0
    assert redis_place.unacked() == 0


def test_a_due_time_beyond_the_range_of_redis_waits_in_the_index(redis_place: RedisPlace) -> None:
    app = redis_place.app()
    app.actor(lambda: None, actor_name="job")
    app.broker.declare_queue(redis_place.queue)
    for number in range(2 * IN_HAND):
        options = {"eta": 10**400, "redis_message_id": str(number)}
        body = Message(f"{redis_place.queue}.DQ", "job", (), {}, options).encode()
        app.broker.do_enqueue(f"{redis_place.queue}.DQ", str(number), body)
    with app.working(1):
        until(lambda: index_of(redis_place) >= IN_HAND)
    assert len(redis_place.left()) == 2 * IN_HAND


def test_the_worker_of_plain_dramatiq_beside_ours_takes_its_share(redis_place: RedisPlace) -> None:
    app = redis_place.app()
    send_far(app, 3 * IN_HAND)
    plain = redis_place.broker()
    done: list[int] = []
    near = app.actor(done.append, actor_name="near")
    for name, fn in (("far", lambda number: None), ("near", done.append)):
        dramatiq.actor(fn, actor_name=name, queue_name=redis_place.queue, broker=plain)
    stock = Worker(plain, worker_timeout=100, worker_threads=1)
    stock.start()
    try:
        with app.working(1):
            for number in range(10):
                near.send_with_options(args=(number,), delay=300)
            until(lambda: sorted(done) == list(range(10)), describe=lambda: done)
    finally:
        stock.stop(10_000)
    assert len(redis_place.left()) == 3 * IN_HAND
