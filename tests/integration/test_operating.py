"""The commands on real servers, interrupted at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pika.exceptions
import pytest
import redis
from dramatiq import Message
from dramatiq.brokers.rabbitmq import RabbitmqBroker

from dramatiq_policies import constant, ops
from dramatiq_policies.delivery.broker_state import state_of
from dramatiq_policies.middleware.idempotency import guard_on
from dramatiq_policies.ops import Filter
from dramatiq_policies.ops.dead_letters import dead_letter as letters
from dramatiq_policies.rules.rule import RetryPolicy
from tests.proxy import Proxy, amqp_method

from .places import RabbitmqPlace, RedisPlace, lose_an_answer, soon, until

ROOT = Path(__file__).parents[2]
MANY = 2_000
APP = """
import os, dramatiq
from dramatiq_policies import install
if os.environ["KIND"] == "redis":
    from dramatiq.brokers.redis import RedisBroker
    broker = RedisBroker(url=os.environ["URL"], namespace=os.environ["NAMESPACE"])
else:
    from dramatiq.brokers.rabbitmq import RabbitmqBroker
    broker = RabbitmqBroker(url=os.environ["URL"])
install(broker)
dramatiq.set_broker(broker)

@dramatiq.actor(queue_name=os.environ["QUEUE"])
def job(number): pass

broker.declare_queue(os.environ["QUEUE"] + "-other")
"""


class Gone(Exception):
    pass


def bury(place, app, count, **failure):
    """Dead letters as a worker leaves them, without running one."""
    letters = []
    for number in range(count):
        why = {
            "outcome": "dead",
            "reason": "exhausted",
            "exception": "app.Gone",
            "message": f"no {number}",
            "attempts": 3,
        }
        why.update(failure, failed_at=int(time.time() * 1_000) + number)
        options = {"failure": why, "retries": 2, "policies": {"total": 3}, "redis_message_id": f"r{number}"}
        letters.append(Message(place.queue, "job", (number,), {}, options))
    bury_bodies(place, app, [letter.encode() for letter in letters])
    return [letter.message_id for letter in letters]


def bury_bodies(place, app, bodies):
    if isinstance(place, RedisPlace):
        with place.client.pipeline() as pipe:
            for number, body in enumerate(bodies):
                pipe.hset(place.key(f"{place.queue}.XQ.msgs"), f"r{number}", body)
                pipe.zadd(place.key(f"{place.queue}.XQ"), {f"r{number}": 1_700_000_000_000 + number})
            pipe.execute()
    else:
        app.broker.declare_queue(place.queue, ensure=True)
        for body in bodies:
            place.channel.basic_publish("", f"{place.queue}.XQ", body)
        until(lambda: count_dead(place) == len(bodies))


def count_dead(place):
    if isinstance(place, RedisPlace):
        return place.client.zcard(place.key(f"{place.queue}.XQ"))
    return place.channel.queue_declare(f"{place.queue}.XQ", passive=True).method.message_count


@pytest.fixture
def app(place):
    app = place.app()

    @app.actor
    def job(number):
        if number < 0:
            raise Gone(f"no {number}")

    return app


def numbers(messages):
    return [message.args[0] for message in messages]


def test_dead_letters_of_a_worker_are_listed_in_order_and_stay(place, app):
    job = app.broker.actors["job"]
    job.options["retry_on"] = None

    with app.working(threads=1):
        for number in (-1, -2, -3):
            job.send_with_options(args=(number,), max_retries=0)
        app.wait_for("dead", "dead", "dead")
    for _ in range(2):
        letters = list(ops.dead_letters(app.broker))
        assert [letter.message.args[0] for letter in letters] == [-1, -2, -3]
    assert letters[0].exception.endswith("Gone")
    assert letters[0].reason == "unclassified"
    (group,) = ops.summarise(app.broker)
    assert group.count == 3
    assert len(list(ops.dead_letters(app.broker, limit=2))) == 2
    assert numbers(place.dead()) == [-1, -2, -3]


def test_a_replayed_message_runs_and_is_gone_from_the_dead(place, app):
    ids = bury(place, app, 3)
    moved = ops.replay(app.broker, where=Filter(message_ids=(ids[1],)))
    assert moved.count == 1
    app.work_until("succeeded")
    assert app.events[0].message_id == ids[1]
    assert app.events[0].attempt == 1
    assert numbers(place.dead()) == [0, 2]


def test_a_replay_that_fails_again_is_a_new_dead_letter_and_not_replayed_twice(place, app):
    @app.actor(retry_on={Gone: RetryPolicy(attempts=1, wait=constant(1))}, actor_name="again")
    def again():
        raise Gone

    with app.working(threads=1):
        again.send()
        app.wait_for("dead")
        moved = ops.replay(app.broker, rate=50)
        app.wait_for("dead", "dead")
    assert moved.count == 1
    (letter,) = place.dead()
    assert letter.options["failure"]["attempts"] == 1


def test_dead_letters_are_replayed_in_their_order(place, app):
    bury(place, app, 1_200)
    assert ops.replay(app.broker).count == 1_200
    if isinstance(place, RedisPlace):
        ids = place.client.lrange(place.key(place.queue), 0, -1)
        bodies = place.client.hmget(place.key(f"{place.queue}.msgs"), ids)
        found = [Message.decode(body) for body in bodies]
    else:
        found = [Message.decode(body) for body in place.drain(place.queue)]
    assert numbers(found) == list(range(1_200))
    assert {json.dumps(message.options["policies"]) for message in found} == {'{"replays": 1}'}
    assert count_dead(place) == 0


def test_a_dry_run_counts_the_replayable_dead_letters_up_to_its_limit(place, app, monkeypatch):
    letters = [Message(place.queue, "job", (number,), {}, {"redis_message_id": "r"}) for number in range(4)]
    bury_bodies(place, app, [b"{no json", *(letter.encode() for letter in letters)])
    would = ops.replay(app.broker, dry_run=True)
    assert (would.count, would.unreadable, would.seen) == (4, 1, 5)

    def all_at_once(browser):
        raise AssertionError("the server would send all there is")

    monkeypatch.setattr("dramatiq_policies.brokers.rabbitmq.browser.RabbitmqBrowser.read_all", all_at_once)
    would = ops.replay(app.broker, limit=2, dry_run=True)
    assert (would.count, would.unreadable, would.seen) == (2, 1, 3)
    assert ops.purge(app.broker, limit=2, dry_run=True).count == 2
    assert count_dead(place) == 5


def test_dead_letters_outside_the_filter_keep_their_order(place, app):
    bury(place, app, 1_200)
    moved = ops.purge(app.broker, where=Filter(error="7"))
    kept = [number for number in range(1_200) if "7" not in str(number)]
    assert moved.count == 1_200 - len(kept)
    assert numbers(place.dead()) == kept


def test_messages_are_moved_to_another_queue_in_their_order(place, app):
    target = f"{place.queue}-other"
    app.broker.declare_queue(target)
    try:
        if isinstance(place, RabbitmqPlace):
            app.broker.declare_queue(target, ensure=True)
        job = app.broker.actors["job"]
        for number in range(700):
            job.send(number)
            app.broker.enqueue(job.message(number).copy(actor_name="other"))
        if isinstance(place, RabbitmqPlace):
            until(lambda: place.ready() == 1_400)
        assert ops.move(app.broker, place.queue, target, actor="job", limit=600).count == 600
        moved = place.left(target)
        assert sorted(numbers(moved)) == list(range(600))
        assert {message.queue_name for message in moved} == {target}
        left = place.left()
        assert Counter(message.actor_name for message in left) == {"job": 100, "other": 700}
    finally:
        if isinstance(place, RabbitmqPlace):
            for name in (target, f"{target}.DQ", f"{target}.XQ"):
                place.channel.queue_delete(name)


@pytest.fixture
def run(place, tmp_path):
    """The command as a process."""
    (tmp_path / "killed_app.py").write_text(APP)
    (tmp_path / "keyed_app.py").write_text(APP.replace("actor(", 'actor(idempotency_key="n:{number}", '))
    namespace = place.namespace if isinstance(place, RedisPlace) else ""
    here = {"KIND": place.kind, "QUEUE": place.queue, "NAMESPACE": namespace, "PYTHONPATH": str(ROOT)}
    started = []
    # A shell that runs the tests in the background has it ignored, and what a test starts would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def start(*args):
        process = subprocess.Popen(
            [sys.executable, "-m", "dramatiq_policies", *args],
            cwd=tmp_path,
            env={**os.environ, **here, "URL": place.url},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    signal.signal(signal.SIGINT, before)
    for process in started:
        process.kill()
        process.communicate()


def test_a_command_that_is_interrupted_in_the_middle_of_a_conversation_ends(rabbitmq_place, monkeypatch):
    app = rabbitmq_place.app()
    app.broker.declare_queue(rabbitmq_place.queue)
    lose_an_answer(monkeypatch, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        soon(lambda: list(ops.dead_letters(app.broker)))
    assert ops.summarise(app.broker) == []


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_a_replay_interrupted_again_and_again_loses_nothing(place, app, run, blow):
    ids = bury(place, app, MANY)
    random.seed(ids[0])
    killed = 0
    for _ in range(10):
        before = count_dead(place)
        process = run("dead", "replay", "killed_app", "--yes")
        # Not before it works, and then at any moment.
        until(lambda p=process, b=before: p.poll() is not None or count_dead(place) < b)
        time.sleep(random.random() * 0.15)
        if process.poll() is None:
            process.send_signal(blow)
        # 130 is what it says itself; SIGINT's own, that it was over already.
        if process.wait(20) in ((-signal.SIGKILL,) if blow is signal.SIGKILL else (130, -signal.SIGINT)):
            killed += 1
        if isinstance(place, RabbitmqPlace):
            time.sleep(0.1)  # Until the server has noticed.
    assert killed >= 2
    assert run("dead", "replay", "killed_app", "--yes").wait(60) == 0
    found = Counter(message.message_id for message in place.left())
    left = Counter(message.message_id for message in place.dead())
    assert set(found) | set(left) == set(ids)
    assert not left
    twice = sum(found.values()) - len(found)
    assert twice <= (0 if place.kind == "redis" else killed)


def test_a_move_that_is_killed_loses_nothing(place, app, run):
    target = f"{place.queue}-other"
    app.broker.declare_queue(target)
    job = app.broker.actors["job"]
    try:
        sent = [job.send(number).message_id for number in range(1_000)]
        if isinstance(place, RabbitmqPlace):
            app.broker.declare_queue(target, ensure=True)
            until(lambda: place.ready() == 1_000)
        moving = ("queues", "move", "killed_app", place.queue, "--to", target, "--yes")
        killed = 0
        for _ in range(2):
            before = place.ready()
            process = run(*moving)
            until(lambda p=process, b=before: p.poll() is not None or place.ready() < b)
            time.sleep(random.random() * 0.1)
            process.kill()
            killed += process.wait(20) != 0
            time.sleep(0.1)
        assert run(*moving).wait(60) == 0
        found = Counter(message.message_id for message in place.left(target))
        assert set(found) == set(sent)
        assert place.left() == []
        assert sum(found.values()) - 1_000 <= (0 if place.kind == "redis" else killed)
    finally:
        if isinstance(place, RabbitmqPlace):
            for name in (target, f"{target}.DQ", f"{target}.XQ"):
                place.channel.queue_delete(name)


@pytest.mark.parametrize("executed", [False, True], ids=["before", "after"])
def test_a_replay_whose_connection_is_cut_loses_nothing(place, executed):
    confirmed = None if place.kind == "redis" else amqp_method(60, 80)
    with Proxy.before(place.url) as proxy:
        app = place.app(proxy.url)
        app.broker.declare_queue(place.queue)
        ids = bury(place, app, 30)
        trap = proxy.cut_when(b'"replays"', after=executed, reply=confirmed, skip=12)
        moved = ops.MoveResult()
        # A client of Redis asks again of its own accord; whoever else is cut off, says so.
        with contextlib.suppress(ops.OperationError):
            ops.replay(app.broker, moved=moved)
        assert trap.wait()
        if isinstance(place, RabbitmqPlace):
            assert moved.count == 12
            until(lambda: count_dead(place) >= 17)
        ops.replay(app.broker)
        app.broker.close()
    found = Counter(message.message_id for message in place.left())
    assert set(found) == set(ids)
    assert place.dead() == []
    assert sum(found.values()) == 30 + (1 if executed and isinstance(place, RabbitmqPlace) else 0)


def test_the_commands_work_as_processes(place, app, run):
    ids = bury(place, app, 3)
    out, err = run("dead", "summary", "killed_app", "--format", "json").communicate(timeout=20)
    assert err == ""
    assert [(group["count"], group["actor"]) for group in json.loads(out)] == [(3, "job")]
    out, _ = run("dead", "list", "killed_app").communicate(timeout=20)
    assert [line.split()[2] for line in out.splitlines()] == ids[::-1]  # The newest first.
    out, _ = run("dead", "purge", "killed_app", "--yes").communicate(timeout=20)
    assert out == "3 dead letters deleted.\n"
    assert count_dead(place) == 0


@pytest.mark.parametrize("asked", [("dead", "summary"), ("queues",), ("check", "--live")])
def test_a_server_that_is_down_is_one_sentence_without_a_password(place, run, asked):
    url = "redis://:s3cret@127.0.0.1:1/0" if place.kind == "redis" else "amqp://guest:s3cret@127.0.0.1:1"
    place.url = url
    process = run(*asked, "killed_app")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "127.0.0.1:1" in err
    assert "refused" in err
    assert "s3cret" not in err


def test_queues_are_read_by_a_process(place, app, run):
    bury(place, app, 2)
    for number in range(3):
        app.broker.actors["job"].send(number)
    if isinstance(place, RabbitmqPlace):
        until(lambda: place.ready() == 3)
    out, err = run("queues", "killed_app", "--queue", place.queue, "--format", "json").communicate(timeout=20)
    assert err == ""
    (reading,) = json.loads(out)
    assert {name: reading[name] for name in ("queue", "ready", "delayed", "running", "dead")} == {
        "queue": place.queue,
        "ready": 3,
        "delayed": 0,
        "running": 0,
        "dead": 2,
    }
    assert len(place.left()) == 3


@pytest.mark.parametrize("place", ["redis"], indirect=True)
def test_the_monitor_alerts_though_no_worker_lives(place, app, run, tmp_path):
    source = (tmp_path / "killed_app.py").read_text()
    interval = "timedelta(milliseconds=100)"
    monitored = (
        f"install(broker, queue_monitor=QueueMonitor(interval={interval}, thresholds={{'*': Threshold(ready=2)}}))"
    )
    (tmp_path / "watched_app.py").write_text(
        source.replace("install(broker)", monitored).replace(
            "import install", "import QueueMonitor, Threshold, install\nfrom datetime import timedelta"
        )
    )
    for number in range(2):
        app.broker.actors["job"].send(number)
    process = run("monitor", "watched_app")
    assert "Watching" in process.stderr.readline()
    assert f"Queue {place.queue}: 2 messages wait (threshold 2)" in process.stderr.readline()
    process.terminate()
    assert process.wait(20) == 0


def live_codes(findings):
    return [finding.code for finding in findings]


def test_check_live_names_the_server(place, app):
    findings, facts = ops.check_live(app.broker)
    assert facts["server"].lower() == place.kind
    assert re.match(r"\d+\.\d+", facts["version"])
    assert not {"DP104", "DP105", "DP107", "DP108", "DP109"} & set(live_codes(findings))


def test_check_live_sees_how_redis_keeps_messages(redis_place, monkeypatch):
    app = redis_place.app()
    client = app.broker.client
    real = client.info
    said = {"maxmemory_policy": "allkeys-lru", "aof_enabled": 0, "role": "slave"}

    def info(section):
        return {name: said.get(name, value) for name, value in real(section).items()}

    monkeypatch.setattr(client, "info", info)
    monkeypatch.setattr(client, "config_get", lambda name: {"save": ""})
    monkeypatch.setattr(client, "time", lambda: (int(time.time()) - 60, 0))
    monkeypatch.setattr(app.broker, "dead_message_ttl", 1_000)
    findings, _ = ops.check_live(app.broker)
    assert live_codes(findings) == ["DP109", "DP101", "DP102", "DP104", "DP108"]
    said["aof_enabled"], said["maxmemory_policy"], said["role"] = 1, "noeviction", "master"
    monkeypatch.setattr(client, "time", lambda: (time.time(), 0))
    assert live_codes(ops.check_live(app.broker)[0]) == ["DP108"]


def test_check_live_sees_a_store_that_may_forget(redis_place, monkeypatch):
    app = redis_place.app()
    store = guard_on(state_of(app.broker)).claims.store
    monkeypatch.setattr(store.client, "info", lambda section: {"maxmemory": 1, "maxmemory_policy": "allkeys-lru"})
    findings, facts = ops.check_live(app.broker)
    assert "DP110" in live_codes(findings)
    assert facts["store"] == "RedisStore"


def test_check_live_lists_the_questions_that_a_managed_redis_refuses(redis_place, monkeypatch):
    app = redis_place.app()
    client = app.broker.client
    real = client.info

    def refused(name):
        raise redis.ResponseError("unknown command 'CONFIG'")

    monkeypatch.setattr(client, "info", lambda section: {**real(section), "aof_enabled": 0})
    monkeypatch.setattr(client, "config_get", refused)
    findings, facts = ops.check_live(app.broker)
    (finding,) = [one for one in findings if one.code == "DP103"]
    assert finding.message == "appendonly is off; snapshots: not known"
    assert "snapshots" not in facts
    assert facts["unknown"] == ["whether Redis makes snapshots (CONFIG GET is refused)"]


def test_check_live_says_that_the_store_can_t_be_asked(redis_place, monkeypatch):
    app = redis_place.app()

    def away(section):
        raise redis.ConnectionError("no route")

    monkeypatch.setattr(guard_on(state_of(app.broker)).claims.store.client, "info", away)
    with pytest.raises(ops.OperationError, match=r"Redis can't be reached at .*no route"):
        ops.check_live(app.broker)


def test_check_live_sees_the_heartbeat_and_the_dead_letter_settings_of_rabbitmq(rabbitmq_place, monkeypatch):
    broker = RabbitmqBroker(url=rabbitmq_place.url, confirm_delivery=True)
    broker.parameters.heartbeat = 0
    monkeypatch.setattr("dramatiq.brokers.rabbitmq.DEAD_MESSAGE_TTL", 1_000)
    findings, facts = ops.check_live(rabbitmq_place.app(broker=broker).broker)
    assert live_codes(findings) == ["DP107", "DP108"]
    assert (facts["confirm_delivery"], facts["heartbeat_s"]) == (True, 0)
    broker.close()


def test_check_live_sees_queues_that_were_declared_otherwise(rabbitmq_place):
    app = rabbitmq_place.app()
    app.broker.declare_queue(rabbitmq_place.queue)
    findings, _ = ops.check_live(app.broker)
    assert live_codes(findings) == ["DP106"]
    with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="404"):
        rabbitmq_place.connection.channel().queue_declare(rabbitmq_place.queue, passive=True)
    rabbitmq_place.channel.queue_declare(rabbitmq_place.queue, durable=True, arguments={"x-max-priority": 3})
    findings, _ = ops.check_live(app.broker)
    assert live_codes(findings) == ["DP106", "DP105"]
    assert "x-max-priority" in findings[1].message or "inequivalent arg" in findings[1].message


@pytest.mark.parametrize("place", ["redis"], indirect=True)
def test_keys_are_asked_of_the_store_by_a_process(place, run):
    app = place.app()

    @app.actor(idempotency_key="n:{number}")
    def job(number):
        pass

    job.send(7)
    app.work_until("succeeded")
    out, err = run("keys", "show", "keyed_app:job", "7", "--format", "json").communicate(timeout=20)
    assert err == ""
    assert {name: json.loads(out)[name] for name in ("state", "key")} == {"state": "completed", "key": "n:7"}
    out, _ = run("keys", "forget", "keyed_app:job", "7", "--yes").communicate(timeout=20)
    assert out == "Forgot n:7 (it was completed).\n"
    out, _ = run("keys", "show", "keyed_app:job", "number=7", "--format", "json").communicate(timeout=20)
    assert json.loads(out)["state"] == "none"


def test_a_dead_letter_stored_twice_is_run_once_by_its_key(redis_place):
    app = redis_place.app()

    @app.actor(idempotency_key="n:{number}")
    def job(number):
        pass

    (first, *_) = bury(redis_place, app, 1)
    (letter,) = ops.dead_letters(app.broker)
    # As a kill on RabbitMQ between the confirmed replay and its ack leaves it.
    app.broker.enqueue(letters.for_replay(letter.message, redis_place.queue))
    assert ops.replay(app.broker).count == 1
    app.work_until("duplicate", "succeeded", threads=1)
    assert {event.message_id for event in app.events} == {first}


def test_dead_letters_of_a_queue_that_no_actor_declares_are_found_by_its_name(rabbitmq_place):
    app = rabbitmq_place.app()
    app.broker.declare_queue(rabbitmq_place.queue, ensure=True)
    retired = f"{rabbitmq_place.queue}-retired"
    dead = Message(retired, "gone", (), {}, {"failure": {"outcome": "dead", "exception": "app.Gone"}})
    rabbitmq_place.channel.queue_declare(f"{retired}.XQ", arguments={"x-message-ttl": 60_000, "x-expires": 60_000})
    rabbitmq_place.channel.basic_publish("", f"{retired}.XQ", dead.encode())
    until(lambda: len(list(ops.dead_letters(app.broker, [retired]))) == 1)
    with pytest.raises(
        ops.OperationError, match=r"No actor uses the queue .* any more; name a target queue with --to-queue"
    ):
        ops.replay(app.broker, [retired])
    assert ops.replay(app.broker, [retired], to_queue=rabbitmq_place.queue).count == 1
    with pytest.raises(ops.OperationError, match="holds no messages"):
        list(ops.dead_letters(app.broker, [f"{retired}-never"]))
