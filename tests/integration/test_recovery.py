"""Redis: who counts as dead, and what becomes of the messages of a dead worker."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import redis
from dramatiq.brokers.redis import RedisBroker
from dramatiq.common import current_millis
from dramatiq.errors import ConnectionClosed

from dramatiq_policies import install
from dramatiq_policies.brokers.redis.recovery import Recovery

from .places import RedisPlace, until

HOUR = 3_600_000
TIMEOUT = 600


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dramatiq_policies.brokers.redis.recovery._CHECK_EVERY", 0.05)
    monkeypatch.setattr("dramatiq_policies.brokers.redis.recovery._SEARCH_AGAIN", 50)


class DeadWorker:
    """A worker of another version, which took messages and writes its heartbeats by a clock of its own."""

    def __init__(self, place: RedisPlace, ahead: int = 0) -> None:
        self.place = place
        self.ahead = ahead
        self.name = "a-worker-that-died"

    def beat(self) -> None:
        self.place.client.zadd(self.place.key("__heartbeats__"), {self.name: current_millis() + self.ahead})

    def hold(self, body: bytes, redis_id: str = "the-id", queue: str | None = None) -> None:
        queue = queue or self.place.queue
        self.place.client.hset(self.place.key(f"{queue}.msgs"), redis_id, body)
        self.place.client.sadd(self.acks(queue), redis_id)

    def acks(self, queue: str | None = None) -> str:
        return self.place.key(f"__acks__.{self.name}.{queue or self.place.queue}")

    def holds(self) -> int:
        return self.place.client.scard(self.acks())


def broker_of(place: RedisPlace) -> Any:
    broker = place.broker()
    broker.heartbeat_timeout = TIMEOUT
    return broker


def app_of(place: RedisPlace) -> Any:
    app = place.app(broker=broker_of(place))
    app.runs = []

    @app.actor(actor_name="job", max_retries=0)
    def job(number: Any) -> None:
        app.runs.append(number)

    app.broker.declare_queue(place.queue)
    app.job = job
    return app


def body_of(app: Any, *args: Any, **options: Any) -> bytes:
    body: bytes = app.job.message_with_options(args=args, redis_message_id="the-id", **options).encode()
    return body


FAILURE = {"outcome": "dead", "reason": "unclassified", "attempts": 1}


# A dead letter of 0.1.0 is written in the message's place, and moved by a second command.


@pytest.mark.parametrize("padding", [0, 1_100_000], ids=["small", "too large to be looked into on the server"])
def test_a_dead_letter_that_its_worker_could_not_move_is_moved_and_not_run(
    redis_place: RedisPlace, padding: int
) -> None:
    app, dead = app_of(redis_place), DeadWorker(redis_place)
    body = body_of(app, "x" * padding, failure=FAILURE)
    dead.beat()
    dead.hold(body)
    with app.working():
        until(lambda: redis_place.dead_bodies() == [body])
    assert app.runs == []
    assert redis_place.left() == []


def test_a_message_whose_arguments_speak_of_a_failure_comes_back_and_runs(redis_place: RedisPlace) -> None:
    app, dead = app_of(redis_place), DeadWorker(redis_place)
    dead.beat()
    dead.hold(body_of(app, {"failure": FAILURE}))
    app.work_until("succeeded")
    assert app.runs == [{"failure": FAILURE}]
    assert redis_place.left() == redis_place.dead() == []


def test_a_body_that_changes_after_it_was_read_is_not_written_over(
    redis_place: RedisPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, dead = app_of(redis_place), DeadWorker(redis_place)
    letter = body_of(app, "failure", failure=FAILURE)
    marked = Recovery._marked
    seen = []

    def slow(self: Recovery, body: bytes) -> bool:
        if not seen:
            # The worker was only silent, and writes its dead letter in between.
            dead.hold(letter)
        seen.append(body)
        return marked(self, body)

    monkeypatch.setattr(Recovery, "_marked", slow)
    dead.beat()
    dead.hold(body_of(app, "failure"))
    with app.working():
        until(lambda: redis_place.dead_bodies() == [letter])
    assert len(seen) == 2
    assert app.runs == []
    assert redis_place.left() == []


@pytest.mark.parametrize("ends", ["moved", "acked", "speaks"])
def test_a_worker_that_ends_its_message_while_recovery_looks_is_not_overruled(
    redis_place: RedisPlace, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    app, dead = app_of(redis_place), DeadWorker(redis_place)
    body = body_of(app, "failure", failure=FAILURE)
    marked = Recovery._marked
    seen = []

    def slow(self: Recovery, body: bytes) -> bool:
        seen.append(body)
        if ends == "speaks":
            dead.beat()
        else:
            stock.do_nack(redis_place.queue, "the-id") if ends == "moved" else stock.do_ack(redis_place.queue, "the-id")
        return marked(self, body)

    stock = redis_place.broker()
    stock.broker_id = dead.name
    monkeypatch.setattr(Recovery, "_marked", slow)
    dead.beat()
    dead.hold(body)
    consumer = app.broker.consume(redis_place.queue, timeout=1)
    until(lambda: next(consumer) or seen)
    if ends == "speaks":
        assert dead.holds() == 1
        assert redis_place.dead() == []
    else:
        assert redis_place.dead_bodies() == ([body] if ends == "moved" else [])
        assert redis_place.left() == []


def test_a_dead_letter_is_written_in_one_step(redis_place: RedisPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    app = app_of(redis_place)

    @app.actor(max_retries=0)
    def fails() -> None:
        raise ValueError

    monkeypatch.setattr(RedisBroker, "__getattr__", no_command_of_dramatiqs)
    fails.message()
    app.broker.scripts["dispatch"] = None  # nor by any other way
    message = fails.message().copy(options={"redis_message_id": "the-id"})
    redis_place.push_as("the-id", message.encode())
    before = time.time() * 1_000 - 60_000
    app.work_until("dead")
    (letter,) = redis_place.dead()
    assert letter.options["failure"]["reason"] == "unclassified"
    ((_, score),) = redis_place.client.zrange(redis_place.key(f"{redis_place.queue}.XQ"), 0, -1, withscores=True)
    assert before < score < before + 120_000


def test_an_instrumentation_of_dramatiqs_nack_hears_of_each_dead_letter(redis_place: RedisPlace) -> None:
    app = app_of(redis_place)
    heard = []
    nack = app.broker.do_nack

    def instrumented(queue: str, redis_id: str) -> None:
        heard.append((queue, redis_id))
        assert len(redis_place.dead()) == 1
        nack(queue, redis_id)
        if len(heard) == 1:
            raise redis.ConnectionError("lost")

    app.broker.do_nack = instrumented

    @app.actor(max_retries=0)
    def fails() -> None:
        raise ValueError

    redis_place.push_as("the-id", fails.message().encode())
    app.work_until("dead")
    assert heard == [(redis_place.queue, "the-id")] * 2
    assert len(redis_place.dead()) == 1
    assert redis_place.left() == []


def test_a_message_whose_dead_letter_can_not_be_written_is_not_lost(redis_place: RedisPlace) -> None:
    app = app_of(redis_place)
    redis_place.client.set(redis_place.key(f"{redis_place.queue}.XQ"), "of another program")
    app.job.send(1)
    consumer = app.broker.consume(redis_place.queue, timeout=1)
    message = until(lambda: next(consumer))
    with pytest.raises(ConnectionClosed):
        consumer.transport.publish_follow_ups(message, message.delivery, b"the dead letter")
    assert [left.args for left in redis_place.left()] == [(1,)]


def no_command_of_dramatiqs(broker: Any, name: str) -> Any:
    raise AttributeError(name)


# Who is dead is decided by the server's clock.


def test_a_heartbeat_has_no_time_of_the_worker_s_clock(
    redis_place: RedisPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("dramatiq.brokers.redis.current_millis", "dramatiq.common.current_millis"):
        monkeypatch.setattr(name, lambda: 5)
    monkeypatch.setattr("dramatiq_policies.common.clock.time", lambda: 5.0)
    app = app_of(redis_place)

    @app.actor
    def sends() -> None:
        app.job.send(1)

    sends.send()
    app.work_until("succeeded", "succeeded")
    heartbeats = redis_place.client.zrange(redis_place.key("__heartbeats__"), 0, -1, withscores=True)
    seconds, _ = redis_place.client.time()
    assert [name.decode() for name, _ in heartbeats] == [app.broker.broker_id]
    assert abs(heartbeats[0][1] / 1_000 - seconds) < 60


@pytest.mark.parametrize("ahead", [-HOUR, HOUR], ids=["behind", "ahead"])
def test_a_live_worker_of_another_version_keeps_its_messages_with_any_clock(
    redis_place: RedisPlace, ahead: int
) -> None:
    app, other = app_of(redis_place), DeadWorker(redis_place, ahead)
    other.hold(body_of(app, 1))
    recovery = Recovery(app.broker, redis_place.queue)
    enough = time.monotonic() + 3 * TIMEOUT / 1_000
    while time.monotonic() < enough:
        other.beat()
        recovery.recover_if_due()
        assert other.holds() == 1
        time.sleep(0.02)
    app.work_until("succeeded")
    assert redis_place.left() == []


@pytest.mark.parametrize("ahead", [-HOUR, 0, HOUR], ids=["behind", "right", "ahead"])
def test_a_dead_worker_s_messages_return_with_any_clock(redis_place: RedisPlace, ahead: int) -> None:
    app, dead = app_of(redis_place), DeadWorker(redis_place, ahead)
    dead.beat()
    dead.hold(body_of(app, 1))
    app.work_until("succeeded")
    assert redis_place.left() == []


def test_a_recovered_message_is_marked_beside_its_body(redis_place: RedisPlace) -> None:
    app, dead = app_of(redis_place), DeadWorker(redis_place)
    body = body_of(app, 1)
    dead.beat()
    dead.hold(body)
    consumer = app.broker.consume(redis_place.queue, timeout=1)
    message = until(lambda: next(consumer))
    assert message.delivery.redelivered
    assert message.body == body
    consumer.transport.requeue([message])
    again = until(lambda: next(consumer))
    assert again.delivery.redelivered
    assert "redelivered" not in again.options


def test_a_body_larger_than_memory_is_brought_back_without_being_decoded(
    redis_place: RedisPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, dead = app_of(redis_place), DeadWorker(redis_place)
    dead.beat()
    dead.hold(b'{"failure": [' + b"[]," * 400_000 + b"[]]}")
    decoded: list[bytes] = []
    monkeypatch.setattr("dramatiq.Message.decode", decoded.append)
    recovery = Recovery(app.broker, redis_place.queue)
    until(lambda: recovery.recover_if_due() or redis_place.ready())
    assert decoded == []


# Workers that hold nothing are forgotten, so that Dramatiq's maintenance has no reason to call KEYS for them.


def test_silent_workers_that_hold_nothing_are_forgotten_and_no_others(redis_place: RedisPlace) -> None:
    app = app_of(redis_place)
    heartbeats = redis_place.key("__heartbeats__")
    empty = {f"empty-{number}": number for number in range(2_500)}
    odd = {"with.dots": 1, "with": 1}
    redis_place.client.zadd(heartbeats, {**empty, **odd, "elsewhere": 2})
    # Of a queue that nobody here reads.
    redis_place.client.sadd(redis_place.key("__acks__.elsewhere.another"), "an-id")
    redis_place.client.sadd(redis_place.key("__acks__.with.dots.another"), "an-id")

    def left() -> set[str]:
        return {name.decode() for name in redis_place.client.zrange(heartbeats, 0, -1)}

    with app.working():
        # "with" may be the worker that holds "dots.another".
        until(lambda: left() == {"elsewhere", "with.dots", "with", app.broker.broker_id}, describe=left)
    observed = redis_place.client.hkeys(redis_place.key("__observed__"))
    assert {name.decode() for name in observed} == {"elsewhere", "with.dots", "with"}


def test_a_silent_process_of_this_version_is_forgotten_without_a_search(
    redis_place: RedisPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recovery, "_search", None)
    app = app_of(redis_place)
    heartbeats = redis_place.key("__heartbeats__")
    elsewhere = redis_place.app(broker=broker_of(redis_place))
    elsewhere.broker.declare_queue("another")
    elsewhere.broker.enqueue(app.job.message(1).copy(queue_name="another"))
    holder = elsewhere.broker.consume("another", timeout=1)
    message = until(lambda: next(holder))
    producer = redis_place.app(broker=broker_of(redis_place)).broker
    producer.enqueue(app.job.message(2))

    def left() -> set[str]:
        return {name.decode() for name in redis_place.client.zrange(heartbeats, 0, -1)}

    assert left() == {elsewhere.broker.broker_id, producer.broker_id}
    with app.working():
        until(lambda: left() == {elsewhere.broker.broker_id, app.broker.broker_id}, describe=left)
        time.sleep(4 * TIMEOUT / 1_000)
        assert left() == {elsewhere.broker.broker_id, app.broker.broker_id}
        holder.transport.ack(message)
        until(lambda: left() == {app.broker.broker_id}, describe=left)


def test_a_namespace_with_the_letters_of_a_pattern_is_no_pattern(redis_place: RedisPlace) -> None:
    redis_place.namespace += ":[a-z]*"
    app, dead = app_of(redis_place), DeadWorker(redis_place)
    dead.hold(b"{}", queue="another")
    recovery = Recovery(app.broker, redis_place.queue)
    recovery.cursor, recovery.idle = 0, {dead.name.encode(): b"1"}
    until(lambda: recovery._search(redis_place.key("__acks__.").encode()) or recovery.cursor is None)
    redis_place.client.zadd(redis_place.key("__heartbeats__"), {dead.name: 1})
    recovery.cursor, recovery.idle = 0, {dead.name.encode(): b"1"}
    until(lambda: recovery._search(redis_place.key("__acks__.").encode()) or recovery.cursor is None)
    assert redis_place.client.zcard(redis_place.key("__heartbeats__")) == 1


def test_a_worker_that_may_not_search_recovers_all_the_same(
    redis_place: RedisPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, dead = app_of(redis_place), DeadWorker(redis_place)
    redis_place.client.zadd(redis_place.key("__heartbeats__"), {"empty": 1})
    ask = Recovery._ask

    def refusing(self: Recovery, *command: Any) -> Any:
        if command[0] == "SCAN":
            raise redis.exceptions.NoPermissionError("this user has no permissions to run the 'scan' command")
        return ask(self, *command)

    monkeypatch.setattr(Recovery, "_ask", refusing)
    dead.beat()
    dead.hold(body_of(app, 1))
    app.work_until("succeeded")


def test_no_command_of_a_broker_with_dramatiq_policies_runs_dramatiqs_maintenance(redis_place: RedisPlace) -> None:
    broker = install(RedisBroker(url=redis_place.url, namespace=redis_place.namespace, maintenance_chance=1_000_000))
    assert not broker._should_do_maintenance("fetch")
    broker.close()


def test_dead_letters_that_were_kept_long_enough_are_removed(
    redis_place: RedisPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dramatiq_policies.brokers.redis.recovery._EXPIRE_EVERY", 0.1)
    app = app_of(redis_place)
    letters = redis_place.key(f"{redis_place.queue}.XQ")
    old = current_millis() - app.broker.dead_message_ttl - 60_000
    for name, at in (("old", old), ("young", old + 120_000)):
        redis_place.client.zadd(letters, {name: at})
        redis_place.client.hset(f"{letters}.msgs", name, body_of(app, name))
    with app.working():
        until(lambda: [letter.args for letter in redis_place.dead()] == [("young",)])


# A message's id is the one under which it lies.


@pytest.mark.parametrize("said", ["another", "neighbour", "\ud800", "", None], ids=repr)
def test_a_message_that_says_another_id_runs_once_and_its_neighbour_too(
    redis_place: RedisPlace, monkeypatch: pytest.MonkeyPatch, said: str | None
) -> None:
    monkeypatch.setattr("dramatiq_policies.brokers.redis.orphans._CHECK_EVERY", 0.1)
    app = app_of(redis_place)
    body = app.job.message(1).asdict()
    options = {} if said is None else {"redis_message_id": said}
    redis_place.push_as("the-id", json.dumps({**body, "options": options}).encode())
    redis_place.push_as("neighbour", body_of(app, 2))
    with app.working():
        app.wait_for("succeeded", "succeeded")
        until(lambda: not redis_place.unacked())
        # Longer than the requeue of orphaned messages takes.
        time.sleep(0.5)
    assert sorted(app.runs) == [1, 2]
    assert redis_place.left() == redis_place.dead() == []


def test_a_message_that_says_another_id_has_its_retry_and_its_dead_letter(redis_place: RedisPlace) -> None:
    app = app_of(redis_place)

    @app.actor(max_retries=1, min_backoff=10, max_backoff=20)
    def fails() -> None:
        raise ValueError

    body = json.dumps({**fails.message().asdict(), "options": {"redis_message_id": "\ud800"}}).encode()
    redis_place.push_as("the-id", body)
    app.work_until("retried", "dead")
    assert len(redis_place.dead()) == 1
    assert redis_place.left() == []


def test_a_message_under_an_id_that_is_no_text_is_dead_raw(redis_place: RedisPlace) -> None:
    app = app_of(redis_place)
    body = body_of(app, 1)
    redis_place.push_as(b"\xff\xfe", body)  # type: ignore[arg-type]
    app.work_until("dead")
    assert redis_place.dead_bodies() == [body]
    assert not redis_place.client.exists(redis_place.key(f"{redis_place.queue}.msgs"))
