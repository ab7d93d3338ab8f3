"""No message is lost where it passes from hand to hand: real connections, cut at that very moment.

On Redis a publish and its ack are one step, so each message goes on exactly once. On RabbitMQ they are two: a cut in
between may leave two copies, never none.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from importlib import resources
from types import MappingProxyType

import pytest
import redis
from dramatiq import Message, Worker, group, pipeline
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import CurrentMessage, GroupCallbacks
from dramatiq.rate_limits.backends import StubBackend as LimiterBackend
from redis.backoff import NoBackoff
from redis.retry import Retry

from dramatiq_policies import RetryPolicy, Snooze, constant, current_job
from dramatiq_policies._redis import CommandBatcher
from dramatiq_policies.brokers.redis.transport import _FETCH, RedisTransport
from tests.proxy import Proxy, amqp_method

from .places import App, Gate, Place, RabbitmqPlace, RedisPlace, until

pytestmark = pytest.mark.usefixtures("quick_restarts")

CONFIRM = amqp_method(60, 80)  # basic.ack: the server's answer to a publish


class Transient(Exception):
    pass


@pytest.fixture(autouse=True)
def known_script(request: pytest.FixtureRequest) -> None:
    """Redis knows the script, so that the first call that bears a body is the one that is executed."""
    if "redis_place" in request.fixturenames or "redis" in str(getattr(request.node, "callspec", "")):
        source = resources.files("dramatiq_policies.brokers.redis").joinpath("settle.lua").read_text()
        request.getfixturevalue("redis_client").script_load(source)


def calm(app: App, seconds: float = 0.2) -> None:
    """Wait until for a while nothing is published, lies there or is in hand: every copy that there may be has run."""
    seen, since = len(app.events), time.monotonic()
    deadline = since + 15
    while time.monotonic() - since < seconds:
        assert time.monotonic() < deadline, app.events
        if len(app.events) != seen or app.in_hand() or app.place.ready():
            seen, since = len(app.events), time.monotonic()
        time.sleep(0.01)


class Scenario:
    """A job with something to publish; ``marker`` is in the bytes of that, and in nothing sent before it."""

    marker: bytes
    #: The messages published in the end if nothing happens twice.
    outcomes: Mapping[str, int]
    dead = 0
    messages = 1

    def __init__(self, app: App) -> None:
        self.app = app
        self.declare()

    def declare(self) -> None:
        raise NotImplementedError

    def send(self) -> None:
        raise NotImplementedError

    def sent(self) -> None:
        """Send, and see it arrive: RabbitMQ confirms nothing to Dramatiq's own sends."""
        self.send()
        until(lambda: self.app.place.ready() == self.messages)

    def ended(self) -> int:
        return len([event for event in self.app.events if event.outcome != "interrupted"])


class Retried(Scenario):
    marker = b'"policies"'
    outcomes = MappingProxyType({"retried": 1, "succeeded": 1})
    wait = 0

    def declare(self) -> None:
        @self.app.actor(retry_on={Transient: RetryPolicy(attempts=2, wait=constant(self.wait))})
        def job():
            if current_job().attempt == 1:
                raise Transient

        self.send = job.send  # type: ignore[method-assign]


class RetriedLater(Retried):
    wait = 30


class DeadLettered(Scenario):
    marker = b'"failure"'
    outcomes = MappingProxyType({"dead": 1})
    dead = 1

    def declare(self) -> None:
        @self.app.actor(max_retries=0)
        def job():
            raise Transient

        self.send = job.send  # type: ignore[method-assign]


class Snoozed(Scenario):
    marker = b'"policies"'
    outcomes = MappingProxyType({"deferred": 1, "succeeded": 1})

    def declare(self) -> None:
        @self.app.actor
        def job():
            if "policies" not in CurrentMessage.get_current_message().options:
                raise Snooze(0)

        self.app.broker.add_middleware(CurrentMessage())
        self.send = job.send  # type: ignore[method-assign]


class NextStage(Scenario):
    marker = b"second_stage"
    outcomes = MappingProxyType({"succeeded": 2})

    def declare(self) -> None:
        @self.app.actor
        def first():
            return 1

        @self.app.actor
        def second_stage(x):
            assert x == 1

        self.send = lambda: pipeline([first.message(), second_stage.message()], broker=self.app.broker).run()  # type: ignore[method-assign]


class Callback(Scenario):
    marker = b"finished"
    outcomes = MappingProxyType({"succeeded": 4})
    messages = 3

    def declare(self) -> None:
        self.app.broker.add_middleware(GroupCallbacks(LimiterBackend()))

        @self.app.actor
        def member():
            pass

        @self.app.actor
        def finished():
            pass

        def send():
            members = group([member.message() for _ in range(3)], broker=self.app.broker)
            members.add_completion_callback(finished.message())
            members.run()

        self.send = send  # type: ignore[method-assign]


class Told(Scenario):
    """A job with all callbacks of Dramatiq's."""

    errors = 0
    told: tuple[str, ...]

    def declare(self) -> None:
        self.heard: list[str] = []
        for name in ("was_done", "has_failed", "gave_up"):
            self.app.actor(lambda message, info, name=name: self.heard.append(name), actor_name=name)

        @self.app.actor(
            on_success="was_done",
            on_failure="has_failed",
            on_retry_exhausted="gave_up",
            retry_on={Transient: RetryPolicy(attempts=2, wait=constant(0))},
        )
        def job():
            if current_job().attempt <= self.errors:
                raise Transient

        self.send = job.send  # type: ignore[method-assign]


class OnSuccess(Told):
    marker = b"was_done"
    outcomes = MappingProxyType({"succeeded": 2})
    told = ("was_done",)


class OnFailure(Told):
    marker = b"has_failed"
    errors = 1
    outcomes = MappingProxyType({"retried": 1, "succeeded": 3})
    told = ("has_failed", "was_done")


class OnRetryExhausted(Told):
    marker = b"gave_up"
    errors = 2
    outcomes = MappingProxyType({"retried": 1, "dead": 1, "succeeded": 3})
    dead = 1
    told = ("gave_up", "has_failed", "has_failed")


SCENARIOS = [Retried, RetriedLater, DeadLettered, Snoozed, NextStage, Callback, OnSuccess, OnFailure, OnRetryExhausted]


def check(scenario: Scenario, place: Place, *, copies: int) -> None:
    got = Counter(scenario.app.outcomes)
    for event in scenario.app.events:
        if event.outcome == "interrupted":
            assert event.reason == "handoff_failed"
    got.pop("interrupted", None)
    dead = len(place.dead())
    if copies > 1:
        # A run that had ended when its connection was cut does not run here again.
        got.pop("duplicate", None)
        assert got.keys() == scenario.outcomes.keys()
        for outcome, expected in scenario.outcomes.items():
            assert expected <= got[outcome] <= copies * expected
        assert scenario.dead <= dead <= copies * scenario.dead
    else:
        assert got == scenario.outcomes
        assert dead == scenario.dead
    if isinstance(scenario, Told):
        assert set(scenario.heard) == set(scenario.told)
        assert len(scenario.told) <= len(scenario.heard) <= copies * len(scenario.told)
    assert place.left() == []


@pytest.mark.parametrize("executed", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", SCENARIOS)
def test_the_connection_is_cut_during_the_publish(place: Place, kind: type[Scenario], executed: bool) -> None:
    with Proxy.before(place.url) as proxy:
        app = place.app(proxy.url)
        scenario = kind(app)
        scenario.sent()
        reply = CONFIRM if place.kind == "rabbitmq" else None
        trap = proxy.cut_when(scenario.marker, after=executed, reply=reply)
        with app.working():
            assert trap.wait()
            until(lambda: scenario.ended() >= sum(scenario.outcomes.values()), describe=lambda: app.events)
            calm(app)
        check(scenario, place, copies=2 if executed and place.kind == "rabbitmq" else 1)
        app.broker.close()


@pytest.mark.parametrize("executed", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", [RetriedLater, DeadLettered, NextStage])
def test_all_connections_stall_during_the_publish_and_then_are_cut(
    place: Place, kind: type[Scenario], executed: bool
) -> None:
    with Proxy.before(place.url) as proxy:
        app = place.app(proxy.url)
        scenario = kind(app)
        scenario.sent()
        trap = proxy.stall_when(scenario.marker, after=executed)
        with app.working():
            assert trap.wait()
            assert not any(event.outcome in ("retried", "dead") for event in app.events)
            proxy.cut()
            until(lambda: scenario.ended() >= sum(scenario.outcomes.values()), describe=lambda: app.events)
            until(lambda: set(app.outcomes) >= scenario.outcomes.keys())
            calm(app)
        # The cut that ends it all takes the acks of what was running meanwhile with it.
        check(scenario, place, copies=4 if place.kind == "rabbitmq" else 1)
        app.broker.close()


@pytest.mark.parametrize("kind", [Retried, DeadLettered])
def test_the_server_is_away_for_longer_than_one_try(place: Place, kind: type[Scenario]) -> None:
    with Proxy.before(place.url) as proxy:
        app = place.app(proxy.url)
        scenario = kind(app)
        scenario.sent()
        trap = proxy.cut_when(scenario.marker, refuse=True)
        with app.working():
            assert trap.wait()
            proxy.cut()
            time.sleep(0.5)
            assert scenario.ended() < sum(scenario.outcomes.values())
            proxy.accept()
            until(lambda: scenario.ended() >= sum(scenario.outcomes.values()), describe=lambda: app.events)
            until(lambda: set(app.outcomes) >= scenario.outcomes.keys())
            calm(app)
        # The cut that ends it all takes the acks of what was running meanwhile with it.
        check(scenario, place, copies=4 if place.kind == "rabbitmq" else 1)
        app.broker.close()


def test_a_worker_that_stops_while_the_server_is_away_leaves_the_message_for_redelivery(place: Place) -> None:
    with Proxy.before(place.url) as proxy:
        app = place.app(proxy.url)
        scenario = Retried(app)
        scenario.sent()
        trap = proxy.cut_when(scenario.marker, refuse=True)
        with app.working():
            assert trap.wait()
            proxy.cut()
        assert [(event.outcome, event.reason) for event in app.events] == [("interrupted", "handoff_failed")]
        app.broker.close()

    if isinstance(place, RedisPlace):
        # Its process is dead to Redis after heartbeat_timeout; here it is over at once.
        assert len(place.left()) == 1
        broker = place.broker()
        broker.heartbeat_timeout, broker.maintenance_chance = 0, 1_000_000
        until(lambda: broker.do_requeue(place.queue) or place.client.llen(place.key(place.queue)))
    again = place.app()
    Retried(again)
    again.work_until("retried", "succeeded")
    assert place.left() == []
    assert place.dead() == []


@pytest.mark.parametrize("delay", [None, 500], ids=["running", "delayed"])
def test_every_connection_is_cut_again_and_again_and_no_job_is_lost(place: Place, delay: int | None) -> None:
    with Proxy.before(place.url) as proxy:
        app = place.app(proxy.url)
        done: Counter[int] = Counter()
        lock = threading.Lock()

        @app.actor(retry_on={Transient: RetryPolicy(attempts=3, wait=constant(20))})
        def job(number):
            time.sleep(0.01)
            if current_job().attempt == 1:
                raise Transient
            with lock:
                done[number] += 1

        numbers = range(60)
        for number in numbers:
            job.send_with_options(args=(number,), delay=delay)
        with app.working():
            for _ in range(4):
                time.sleep(0.15)
                proxy.cut()
            until(lambda: len(done) == len(numbers), describe=lambda: (len(done), place.left()))
            calm(app)
        assert place.dead() == []
        assert place.left() == []
        if place.kind == "redis":
            assert set(done.values()) == {1}
        app.broker.close()


def test_prefetched_delayed_messages_survive_a_cut_connection(place: Place) -> None:
    with Proxy.before(place.url) as proxy:
        app = place.app(proxy.url)
        done: Counter[int] = Counter()

        @app.actor
        def job(number):
            done[number] += 1

        for number in range(5):
            job.send_with_options(args=(number,), delay=700)
        with app.working() as worker:
            delayed = worker.consumers[f"{place.queue}.DQ"]
            until(lambda: delayed.delay_queue.qsize() == 5)
            assert proxy.cut() > 0
            app.wait_for(*["succeeded"] * 5)
            calm(app)
        assert done == dict.fromkeys(range(5), 1)
        assert place.left() == []
        assert place.dead() == []
        app.broker.close()


def test_the_move_of_a_due_message_is_cut(place: Place) -> None:
    with Proxy.before(place.url) as proxy:
        app = place.app(proxy.url)
        done = []

        @app.actor
        def job():
            done.append(1)

        job.send_with_options(delay=100)
        # The body is sent once more when the message is moved.
        reply = CONFIRM if place.kind == "rabbitmq" else None
        trap = proxy.cut_when(b'"actor_name":"job"', after=True, reply=reply)
        with app.working():
            assert trap.wait()
            until(lambda: done)
            calm(app)
        assert 1 <= len(done) <= (2 if place.kind == "rabbitmq" else 1)
        assert place.left() == []
        assert place.dead() == []
        app.broker.close()


# Bodies and options that nobody would send on purpose.


def envelope(place: Place, **changes) -> bytes:
    fields = {
        "queue_name": place.queue,
        "actor_name": "job",
        "args": [],
        "kwargs": {},
        "options": {"redis_message_id": "x"},
        "message_id": "m",
        "message_timestamp": 1,
    }
    return json.dumps({**fields, **changes}).encode()


HOSTILE: dict[str, Callable[[Place], bytes]] = {
    "no json": lambda place: b"\x80not json",
    "another json": lambda place: b"[1, 2]",
    "no fields": lambda place: b"{}",
    "options null": lambda place: envelope(place, options=None),
    "id no string": lambda place: envelope(place, message_id=7),
    "actor no string": lambda place: envelope(place, actor_name=["job"]),
    "kwargs a list": lambda place: envelope(place, kwargs=[1]),
    "timestamp a string": lambda place: envelope(place, message_timestamp="now"),
}


def test_bodies_that_can_t_be_read_are_dead_raw_and_their_neighbours_run(place: Place) -> None:
    app = place.app()
    done: Counter[int] = Counter()

    @app.actor
    def job(number):
        done[number] += 1

    for number in range(2):
        job.send(number)
    bodies = [make(place) for make in HOSTILE.values()]
    for number, body in enumerate(bodies, 2):
        place.push(body)
        job.send(number)
    with app.working() as worker:
        app.wait_for(*["?"] * (2 * len(bodies) + 2))
        assert all(thread.is_alive() for thread in (*worker.workers, *worker.consumers.values()))

    assert done == dict.fromkeys(range(len(bodies) + 2), 1)
    dead = [event for event in app.events if event.outcome == "dead"]
    assert [(event.reason, event.queue) for event in dead] == [("malformed", place.queue)] * len(bodies)
    assert sorted(place.dead_bodies()) == sorted(bodies)
    assert place.left() == []


def test_the_content_of_messages_is_in_no_log_line(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    app = place.app()

    @app.actor
    def job(number):
        pass

    secret = "4242" * 4
    target = {"queue_name": "q", "actor_name": "job", "args": secret, "kwargs": {}, "options": {}}
    job.send_with_options(args=(secret,), pipe_target=target)
    place.push(b"{" + secret.encode())
    place.push(json.dumps([secret]).encode())
    app.work_until("dead", "dead", "dead")
    assert {event.reason for event in app.events} == {"malformed"}
    assert secret not in caplog.text + repr([vars(record) for record in caplog.records]) + repr(app.events)


@pytest.mark.parametrize("name", ["somebody_elses", "", None])
def test_a_message_belongs_to_the_queue_that_it_was_read_from(place: Place, name: str | None) -> None:
    app = place.app()
    queues = []

    @app.actor(max_retries=0)
    def job(*args):
        queues.append(current_job().queue)
        if args:
            raise Transient

    place_id = "an-id-of-ours"
    good = envelope(place, queue_name=name or f"{place.queue}.DQ", options={"redis_message_id": place_id})
    job.send("fails")
    if isinstance(place, RedisPlace):
        place.push_as(place_id, good)
    else:
        place.push(good)
    app.work_until("succeeded", "dead")
    assert queues == [place.queue] * 2
    assert len(place.dead()) == 1
    assert place.left() == []


STRANGE = [
    {"eta": "soon"},
    {"eta": -1},
    {"eta": float("inf")},
    {"eta": float("nan")},
    {"eta": {"a": 1}},
    {"retries": "many", "max_retries": [1], "min_backoff": -5, "max_backoff": None},
    {"policies": "none of yours"},
    {"policies": {"total": -1, "runs": {"x": [1]}, "history": [1], "snoozed_since": "x"}},
    {"throws": "x", "max_age": "old", "time_limit": "long", "timeout": -1, "ready_at": "x"},
    {"on_failure": 1, "on_success": {}, "on_retry_exhausted": []},
    {"notify_shutdown": "x", "store_results": "y", "broker_priority": 9_000},
]


def test_options_with_any_value_end_no_thread(place: Place) -> None:
    app = place.app()
    done: Counter[int] = Counter()

    @app.actor(retry_on={Transient: RetryPolicy(attempts=2, wait=constant(0))})
    def job(number):
        if current_job().attempt == 1:
            raise Transient
        done[number] += 1

    if isinstance(place, RabbitmqPlace):
        app.broker.declare_queue(place.queue, ensure=True)
    for number, options in enumerate(STRANGE):
        message = Message(place.queue, "job", (number,), {}, {**options, "redis_message_id": f"id-{number}"})
        if isinstance(place, RedisPlace):
            place.push_as(f"id-{number}", message.encode())
        else:
            place.push(message.encode())
    with app.working() as worker:
        until(lambda: len(done) == len(STRANGE), describe=lambda: (done, app.events))
        calm(app)
        assert all(thread.is_alive() for thread in (*worker.workers, *worker.consumers.values()))
    assert set(done.values()) == {1}
    assert place.left() == []
    assert place.dead() == []


NO_MESSAGES = [
    {"pipe_target": "not a message"},
    {"pipe_target": {"queue_name": 1}},
    {"group_completion_callbacks": 7},
    {"group_completion_callbacks": [{"no": "message"}], "group_completion_uuid": "x"},
]


def test_a_composition_that_can_t_be_published_is_dead_before_it_runs(place: Place) -> None:
    app = place.app()
    app.broker.add_middleware(GroupCallbacks(LimiterBackend()))
    ran = []

    @app.actor
    def job():
        ran.append(1)

    for options in NO_MESSAGES:
        app.broker.enqueue(Message(place.queue, "job", (), {}, options))
    job.send()
    app.work_until(*["dead"] * len(NO_MESSAGES), "succeeded")
    assert ran == [1]
    assert {event.reason for event in app.events if event.outcome == "dead"} == {"malformed"}
    assert [letter.options["failure"]["reason"] for letter in place.dead()] == ["malformed"] * len(NO_MESSAGES)
    assert place.left() == []


# Redis.


def kill_clients(client: redis.Redis, name: str) -> int:
    found = [entry["id"] for entry in client.client_list() if entry["name"] == name]
    for entry in found:
        try:
            client.client_kill_filter(_id=entry)
        except redis.ResponseError:
            pass  # it has gone by itself
    return len(found)


def test_client_kill_while_jobs_run(redis_place: RedisPlace) -> None:
    name = redis_place.namespace
    separator = "&" if "?" in redis_place.url else "?"
    app = redis_place.app(f"{redis_place.url}{separator}client_name={name}")
    gate = Gate()
    done: Counter[int] = Counter()

    @app.actor(retry_on={Transient: RetryPolicy(attempts=2, wait=constant(10))})
    def job(number):
        gate()
        if number % 2 and current_job().attempt == 1:
            raise Transient
        done[number] += 1

    for number in range(20):
        job.send(number)
    with app.working():
        assert gate.entered.wait(10)
        assert kill_clients(redis_place.client, name) > 0
        gate.open.set()
        until(lambda: len(done) > 4)
        kill_clients(redis_place.client, name)
        app.wait_for(*["?"] * 30)
        calm(app)
    assert done == dict.fromkeys(range(20), 1)
    assert Counter(app.outcomes) == {"succeeded": 20, "retried": 10}
    assert redis_place.left() == []
    assert redis_place.dead() == []


@pytest.mark.parametrize("retries", [0, 3], ids=["client gives up", "client sends it again"])
def test_a_fetch_whose_reply_is_lost(redis_place: RedisPlace, retries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dramatiq_policies.brokers.redis.orphans._CHECK_EVERY", 0.2)
    with Proxy.before(redis_place.url) as proxy:
        client = redis.Redis.from_url(proxy.url, retry=Retry(NoBackoff(), retries))
        app = redis_place.app(broker=RedisBroker(client=client, namespace=redis_place.namespace))
        done: Counter[int] = Counter()

        @app.actor
        def job(number):
            done[number] += 1

        for number in range(10):
            job.send(number)
        # Its digest, or the script itself where the server does not know it yet.
        fetch = re.compile(_FETCH.digest.encode() + b"|Take messages off a queue")
        trap = proxy.cut_when(fetch, after=True, reply=b"actor_name")
        with app.working():
            assert trap.wait()
            app.wait_for(*["succeeded"] * 10)
            calm(app)
        assert done == dict.fromkeys(range(10), 1)
        assert redis_place.left() == []
        app.broker.close()


@pytest.mark.parametrize("busy", [False, True], ids=["one after the other", "at the same time"])
def test_an_id_that_is_twice_in_the_list_runs_once(redis_place: RedisPlace, busy: bool) -> None:
    """As an enqueue leaves it that a client sent again after a lost reply."""
    app = redis_place.app()
    done = []

    @app.actor
    def job():
        if busy:
            time.sleep(0.3)
        done.append(1)

    job.send()
    ready = redis_place.key(redis_place.queue)
    (redis_id,) = redis_place.client.lrange(ready, 0, -1)
    if busy:
        redis_place.client.rpush(ready, redis_id)
    with app.working():
        app.wait_for("succeeded")
        if not busy:
            redis_place.client.rpush(ready, redis_id)
            until(lambda: redis_place.client.llen(ready) == 0)
        calm(app)
    assert done == [1]
    assert redis_place.client.hlen(f"{ready}.msgs") == 0
    assert redis_place.unacked() == 0


def test_an_id_that_is_fetched_again_just_before_its_ack_runs_once(
    redis_place: RedisPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = redis_place.app()
    gate = Gate()
    fetch = RedisTransport._take_off
    done = []

    def fetching(*args):
        found = fetch(*args)
        if found and gate.entered.is_set():
            # This copy's body is on its way while the job ends and its message is acknowledged.
            gate.open.set()
            until(lambda: done and not app.in_hand())
        return found

    monkeypatch.setattr(RedisTransport, "_take_off", fetching)

    @app.actor
    def job():
        gate()
        done.append(1)

    job.send()
    ready = redis_place.key(redis_place.queue)
    (redis_id,) = redis_place.client.lrange(ready, 0, -1)
    with app.working():
        assert gate.entered.wait(10)
        redis_place.client.rpush(ready, redis_id)
        until(lambda: done)
        calm(app)
    assert done == [1]
    assert redis_place.left() == []


@pytest.mark.parametrize(
    "error", [redis.TimeoutError("slow"), redis.ReadOnlyError("a failover")], ids=["timeout", "read only"]
)
def test_an_ack_that_fails_is_tried_again(
    redis_place: RedisPlace, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = redis_place.app()
    call = CommandBatcher.call
    failures = [error] * 3
    done = []

    def failing(*args):
        if failures:
            raise failures.pop()
        return call(*args)

    monkeypatch.setattr(CommandBatcher, "call", failing)

    @app.actor
    def job():
        done.append(1)

    job.send()
    with app.working():
        until(lambda: not failures and not redis_place.unacked())
    assert done == [1]
    assert app.outcomes == ["succeeded"]
    assert redis_place.left() == []


def test_an_ack_by_somebodys_own_function_lets_the_consumer_fetch_at_once(redis_place: RedisPlace) -> None:
    app = redis_place.app()
    app.broker.do_ack = app.broker.do_ack  # An instrumentation's, on the instance.

    @app.actor
    def job():
        pass

    for _ in range(60):
        job.send()
    worker = Worker(app.broker, worker_timeout=10_000, worker_threads=1)
    worker.start()
    try:
        # Two at a time are prefetched: 30 fetches, each of which would wait for 10 s.
        app.wait_for(*["succeeded"] * 60)
    finally:
        worker.stop(30_000)


def test_a_server_that_answers_too_late(redis_place: RedisPlace) -> None:
    """The client's own time limit strikes in fetch, ack and publish alike."""
    with Proxy.before(redis_place.url) as proxy:
        separator = "&" if "?" in proxy.url else "?"
        app = redis_place.app(f"{proxy.url}{separator}socket_timeout=0.2")
        done: Counter[int] = Counter()

        @app.actor(retry_on={Transient: RetryPolicy(attempts=2, wait=constant(10))})
        def job(number):
            time.sleep(0.01)
            if number % 2 and current_job().attempt == 1:
                raise Transient
            done[number] += 1

        for number in range(40):
            job.send(number)
        with app.working():
            for _ in range(2):
                until(lambda: len(done) > 3)
                proxy.stall("to_client")
                time.sleep(0.4)
                proxy.resume()
            until(lambda: len(done) == 40, describe=lambda: (len(done), redis_place.left()))
            calm(app)
        assert set(done.values()) == {1}
        assert redis_place.left() == []
        assert redis_place.dead() == []
        app.broker.close()


def test_a_custom_do_ack_of_the_broker_is_called(redis_place: RedisPlace) -> None:
    """As instrumentations do, and Dramatiq's own suite."""
    app = redis_place.app()
    stock, acked = app.broker.do_ack, []

    def do_ack(queue: str, redis_id: str) -> object:
        acked.append(queue)
        return stock(queue, redis_id)

    app.broker.do_ack = do_ack

    @app.actor
    def job() -> None: ...

    job.send()
    app.work_until("succeeded")
    assert acked == [redis_place.queue]
    assert redis_place.left() == []


def test_a_worker_that_waits_for_its_last_jobs_keeps_their_messages(redis_place: RedisPlace) -> None:
    """It fetches no more, and yet says that it lives."""
    apps = []
    for _ in range(2):
        broker = RedisBroker(url=redis_place.url, namespace=redis_place.namespace, heartbeat_timeout=1_000)
        apps.append(redis_place.app(broker=broker))
    first, second = apps
    gate = Gate()
    runs: list[str] = []

    @first.actor(actor_name="slow")
    def slow() -> None:
        runs.append("first")
        gate()

    @second.actor(actor_name="slow")
    def stolen() -> None:
        runs.append("second")

    slow.send()
    worker = Worker(first.broker, worker_timeout=100, worker_threads=2)
    worker.start()
    assert gate.entered.wait(10)
    stop = threading.Thread(target=worker.stop)
    stop.start()
    with second.working():
        slow.send()  # runs at the second: the first begins nothing more
        second.wait_for("succeeded")
        time.sleep(4)  # four times the silence at which it would be taken for dead
        gate.open.set()
        stop.join(20)
        calm(second)
    assert runs == ["first", "second"]
    assert first.outcomes == ["succeeded"]
    assert redis_place.left() == []
    for app in apps:
        app.broker.close()


# RabbitMQ.


def test_an_ack_goes_only_to_the_consumer_that_delivered_the_message(rabbitmq_place: RabbitmqPlace) -> None:
    """After a reconnect delivery tags start again at 1: the old message's ack must not remove the one now run."""
    with Proxy.before(rabbitmq_place.url) as proxy:
        app = rabbitmq_place.app(proxy.url)
        gates = {name: Gate() for name in ("old", "new")}

        @app.actor
        def job(name: str) -> None:
            gates[name]()

        job.send("old")
        with app.working():
            assert gates["old"].entered.wait(10)
            proxy.refuse()
            proxy.cut()
            # Somebody else takes the one that comes back, so that the next has its tag.
            until(lambda: rabbitmq_place.drain(rabbitmq_place.queue))
            proxy.accept()
            job.send("new")
            assert gates["new"].entered.wait(10)
            gates["old"].open.set()
            app.wait_for("succeeded")
            proxy.cut()
            gates["new"].open.set()
            app.wait_for("succeeded", "succeeded", "duplicate")
            calm(app)
        assert app.outcomes == ["succeeded", "succeeded", "duplicate"]
        assert rabbitmq_place.left() == []
        assert rabbitmq_place.dead() == []
        app.broker.close()


def test_a_job_that_failed_on_a_closed_connection_is_left_to_its_redelivery(rabbitmq_place: RabbitmqPlace) -> None:
    with Proxy.before(rabbitmq_place.url) as proxy:
        app = rabbitmq_place.app(proxy.url)
        gate = Gate()

        @app.actor(max_retries=0)
        def job():
            gate()
            raise Transient

        message = job.send()
        with app.working(threads=1) as worker:
            assert gate.entered.wait(10)
            consumer = worker.consumers[rabbitmq_place.queue].consumer
            proxy.cut()
            until(consumer.transport.is_revoked)
            gate.open.set()
            app.wait_for("interrupted", "dead")
            calm(app)
        assert app.outcomes == ["interrupted", "dead"]
        assert [letter.message_id for letter in rabbitmq_place.dead()] == [message.message_id]
        assert rabbitmq_place.left() == []
        app.broker.close()


def test_a_dead_letter_queue_that_was_deleted_is_declared_again(rabbitmq_place: RabbitmqPlace) -> None:
    app = rabbitmq_place.app()

    @app.actor(max_retries=0)
    def job():
        raise Transient

    message = job.send()
    rabbitmq_place.channel.queue_delete(f"{rabbitmq_place.queue}.XQ")
    rabbitmq_place.push(b"not json")
    with app.working():
        app.wait_for("dead", "dead")
    assert sorted(event.reason for event in app.events) == ["malformed", "unclassified"]
    bodies = rabbitmq_place.dead_bodies()
    assert b"not json" in bodies
    (letter,) = [Message.decode(body) for body in bodies if body != b"not json"]
    assert letter.message_id == message.message_id
    assert rabbitmq_place.left() == []


def test_a_delay_queue_that_was_deleted_is_declared_again(rabbitmq_place: RabbitmqPlace) -> None:
    app = rabbitmq_place.app()
    gate = Gate()

    @app.actor(retry_on={Transient: RetryPolicy(attempts=2, wait=constant(50))})
    def job():
        gate()
        if current_job().attempt == 1:
            raise Transient

    job.send()
    with app.working():
        assert gate.entered.wait(10)
        rabbitmq_place.channel.queue_delete(f"{rabbitmq_place.queue}.DQ")
        gate.open.set()
        app.wait_for("retried", "succeeded")
    assert rabbitmq_place.left() == []
    assert rabbitmq_place.dead() == []


def test_a_job_that_changes_its_arguments_gets_them_as_sent_again(place):
    app, seen = place.app(), []

    @app.actor(retry_on={Transient: RetryPolicy(attempts=3, wait=constant(20))})
    def job(order):
        seen.append({**order})
        order["at"] = object()  # No encoder takes it.
        del order["secret"]
        raise Transient

    job.send({"id": 1, "secret": "s"})
    app.work_until("retried", "retried", "dead")
    assert seen == [{"id": 1, "secret": "s"}] * 3
    assert [letter.args for letter in place.dead()] == [({"id": 1, "secret": "s"},)]
    assert place.left() == []
