"""Running once on real servers: stores, takeovers after real kills, quarantine, recovery."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dramatiq
import pytest
import redis
from dramatiq import Message, group
from dramatiq.middleware import GroupCallbacks
from dramatiq.rate_limits.backends import RedisBackend

import dramatiq_policies
from dramatiq_policies import Idempotency
from dramatiq_policies.ops import check_live
from dramatiq_policies.stores.memory import MemoryStore
from dramatiq_policies.stores.redis import RedisStore

from .places import App, Place, RabbitmqPlace, RedisPlace, until

APP = """
import os, pathlib, signal, time
import dramatiq
from dramatiq.brokers.{kind} import {broker_class}
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend
from dramatiq_policies import *
from dramatiq_policies.stores.redis import RedisStore

class Transient(Exception):
    pass

STORE = os.environ["APP_STORE"]
NAMESPACE = os.environ["APP_NAMESPACE"]
broker = {broker_class}(url=os.environ["APP_URL"]{arguments})
results = RedisBackend(url=STORE, namespace=NAMESPACE + ":results")
broker.add_middleware(Results(backend=results))
journal = pathlib.Path(os.environ["APP_JOURNAL"])

def note(*words):
    with journal.open("a") as stream:
        stream.write(" ".join(map(str, words)) + "\\n")

def outcome(event):
    note("outcome", event.actor, event.outcome.value, event.reason)

install(
    broker,
    error_classifier=ErrorClassifier(on_outcome=outcome),
    idempotency=Idempotency(RedisStore.from_url(STORE, namespace=NAMESPACE + ":idem"), lease=int(os.environ["APP_LEASE"])),
)
dramatiq.set_broker(broker)

def die():
    # Dramatiq's command waits for ever if a worker dies while it says that it has booted.
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)

def once(word):
    "Whether this is the first time that this is asked, in any process."
    try:
        (journal.parent / ("once-" + word)).touch(exist_ok=False)
        return True
    except FileExistsError:
        return False

class DieAfterTheRetryWasEnqueued(dramatiq.Middleware):
    def after_enqueue(self, broker, message, delay):
        # Meanwhile its duplicate is deferred unrun, and carries no failed run.
        if message.actor_name == "retrying" and message.options.get("policies", {{}}).get("total") and once("enqueued"):
            die()

class DieAfterTheResult(dramatiq.Middleware):
    def after_process_message(self, broker, message, *, result=None, exception=None):
        if message.actor_name == "dies_after_result" and once("result"):
            die()

class NoteTheShutdown(dramatiq.Middleware):
    def before_worker_shutdown(self, broker, worker):
        note("stopping")

broker.add_middleware(DieAfterTheRetryWasEnqueued())
broker.add_middleware(NoteTheShutdown())
broker.add_middleware(DieAfterTheResult(), before=ErrorClassifier)

options = dict(queue_name="{queue}", idempotency_key="k:{{number}}")

@dramatiq.actor(**options)
def plain(number):
    note("effect", number)

def endures(number):
    note("began", number)
    while not (journal.parent / "end").exists():
        time.sleep(0.02)
    note("effect", number)

dramatiq.actor(actor_name="endures", queue_name="{queue}")(endures)
dramatiq.actor(actor_name="guarded_endures", **options)(endures)

@dramatiq.actor(**options)
def dies_before(number):
    if once("before"):
        die()
    note("effect", number)

@dramatiq.actor(**options)
def dies_after(number):
    note("effect", number)
    if once("after"):
        die()

@dramatiq.actor(store_results=True, **options)
def dies_after_result(number):
    note("effect", number)
    return number

@dramatiq.actor(retry_on={{Transient: RetryPolicy(attempts=3, wait=constant(300))}}, **options)
def retrying(number):
    note("run", current_job().attempt)
    if current_job().attempt == 1:
        raise Transient
    note("effect", number)

@dramatiq.actor(**options)
def completes_and_dies(number):
    note("effect", number)
    if once("complete"):
        from dramatiq_policies.idempotency.claims import Claims
        stock = Claims.finish
        def finish(self, claim, decided):
            stock(self, claim, decided)
            die()
        Claims.finish = finish

@dramatiq.actor(queue_name="{queue}")
def killer(number):
    note("start", number)
    time.sleep(0.3)
    die()

@dramatiq.actor(queue_name="{queue}")
def bystander(number):
    note("start", number)
    time.sleep(1.0)
    note("effect", number)

@dramatiq.actor(queue_name="{queue}", idempotent=True)
def guarded_killer(number):
    note("start", number)
    die()

@dramatiq.actor(**options)
def long(number):
    note("began", os.getpid())
    time.sleep(4)
    note("effect", number)
"""


class Application:
    """A real `dramatiq` command that is started again whenever a worker process was killed, as an operator's would be."""

    def __init__(self, place: Place, store: str, folder: Path) -> None:
        self.place = place
        self.folder = folder
        self.journal = folder / "journal"
        self.journal.touch()
        arguments = f", namespace={place.namespace!r}, heartbeat_timeout=1500" if isinstance(place, RedisPlace) else ""
        self.namespace = f"dp-test-{uuid.uuid4().hex}"
        (folder / "once_app.py").write_text(
            APP.format(
                kind=place.kind,
                broker_class=type(place.broker()).__name__,
                arguments=arguments,
                queue=place.queue,
            )
        )
        self.environment = {
            **os.environ,
            "APP_URL": place.url,
            "APP_STORE": store,
            "APP_NAMESPACE": self.namespace,
            "APP_JOURNAL": str(self.journal),
            "APP_LEASE": "4000",
            "PYTHONPATH": os.pathsep.join([str(folder), str(Path(dramatiq_policies.__file__).parents[1])]),
        }
        self.producer = place.broker()
        self.producer.declare_queue(place.queue)
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self._stop = threading.Event()
        self._keeper: threading.Thread | None = None

    def send(self, actor: str, number: int, **options: Any) -> Message[Any]:
        return self.producer.enqueue(Message(self.place.queue, actor, (number,), {}, options))

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dramatiq", "once_app", "--processes", "1", "--threads", "4"],
                env=self.environment,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @contextlib.contextmanager
    def working(self) -> Any:
        self.process = self._start()

        def keep() -> None:
            while not self._stop.wait(0.1):
                assert self.process is not None
                if self.process.poll() is not None:
                    self.process = self._start()

        self._keeper = threading.Thread(target=keep)
        self._keeper.start()
        try:
            yield
        finally:
            self._stop.set()
            self._keeper.join()
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(20)

    def lines(self) -> Counter[str]:
        return Counter(self.journal.read_text().splitlines())

    def come_to_rest(self) -> None:
        """Wait until nothing has happened for longer than any message is requeued for."""
        before, since = self.lines(), time.monotonic()
        while time.monotonic() - since < 3.0:
            time.sleep(0.1)
            if (now := self.lines()) != before:
                before, since = now, time.monotonic()

    def wait_for(self, *lines: str, timeout: float = 40.0) -> None:
        until(lambda: self.lines().keys() >= set(lines), timeout, lambda: (self.lines(), self.log.read_text()[-6_000:]))


@pytest.fixture
def application(place: Place, redis_url: str, tmp_path: Path) -> Any:
    app = Application(place, redis_url, tmp_path)
    yield app
    with redis.Redis.from_url(redis_url) as client:
        for key in client.scan_iter(match=f"{app.namespace}:*", count=5_000):
            client.delete(key)


@pytest.mark.parametrize(
    ("actor", "effects"),
    [
        ("plain", 1),
        ("dies_before", 1),
        # Killed between the effect and everything that says so: no system can know.
        ("dies_after", 2),
        ("dies_after_result", 2),
        ("completes_and_dies", 1),
        ("retrying", 1),
    ],
)
def test_a_worker_killed_at_this_point_loses_nothing_and_doubles_no_more_than_it_must(
    application: Application, actor: str, effects: int
) -> None:
    # The command takes seconds to start anew under a tracer. When the lease ends before the retry runs, its first message begins a run.
    application.environment["APP_LEASE"] = "16000"
    application.send(actor, 7)
    application.send(actor, 7)
    with application.working():
        application.wait_for(f"outcome {actor} duplicate completed", "effect 7")
        until(lambda: application.lines()["effect 7"] >= effects, 40, application.lines)
        application.come_to_rest()
    assert application.lines()["effect 7"] == effects, application.lines()
    if actor == "retrying":
        assert application.lines()["run 1"] == 1, application.lines()
    assert application.place.left() == []
    assert application.place.dead() == []


@pytest.mark.parametrize("actor", ["killer", "guarded_killer"])
def test_a_job_that_kills_its_worker_is_quarantined_and_its_neighbours_are_not(
    application: Application, actor: str
) -> None:
    application.send(actor, 1)
    for number in (2, 3):
        application.send("bystander", number)
    with application.working():
        application.wait_for(f"outcome {actor} dead crashed", "effect 2", "effect 3", timeout=60)
    assert application.lines()["start 1"] == 3, application.lines()
    assert [letter.options["failure"]["reason"] for letter in application.place.dead()] == ["crashed"]
    assert application.place.left() == []


@pytest.mark.parametrize("actor", ["endures", "guarded_endures"])
def test_a_long_job_survives_any_number_of_deployments_that_kill(application: Application, actor: str) -> None:
    application.send(actor, 7)
    for deployment in range(1, 5):
        process = application._start()
        until(lambda count=deployment: application.lines()["began 7"] == count, 60, application.lines)
        process.send_signal(signal.SIGTERM)
        until(lambda count=deployment: application.lines()["stopping"] == count, 20, application.lines)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)
    (application.folder / "end").touch()
    with application.working():
        application.wait_for(f"outcome {actor} succeeded None", timeout=60)
    assert application.lines()["effect 7"] == 1, application.lines()
    assert application.place.dead() == []


def second_queue(place: Place) -> str:
    return f"{place.queue}-b"


@pytest.fixture
def two_services(place: Place, redis_client: redis.Redis, redis_namespace: str) -> Any:
    """Makes two services on one server, each with an actor of the same name and a queue of its own."""

    def make(**store: Any) -> list[tuple[App, Any]]:
        found = []
        for queue in (place.queue, second_queue(place)):
            shared = RedisStore(redis_client, **store)
            shared.namespace = shared.namespace if store else redis_namespace
            app = App(place, place.broker(), Idempotency(shared))
            found.append((app, dramatiq.actor(broker=app.broker, queue_name=queue, actor_name="charge", **CHARGE)(abs)))
        return found

    yield make
    if isinstance(place, RabbitmqPlace):
        for suffix in ("", ".DQ", ".XQ"):
            place.channel.queue_delete(second_queue(place) + suffix)


CHARGE = {"idempotency_key": "{x}"}


def test_two_services_that_share_a_store_run_each_its_own_job(two_services: Any) -> None:
    for app, charge in two_services():
        for _ in range(2):
            charge.send(7)
        app.work_until("succeeded", "duplicate", threads=1)
        assert Idempotency.state(charge, 7).state == "completed"


def test_two_services_that_meet_in_a_namespace_are_found(
    two_services: Any, redis_namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    (one, charge), (other, _) = two_services(namespace=f"{redis_namespace}:shared")
    charge.send(7)
    one.work_until("succeeded")
    assert "namespace" not in caplog.text
    findings, _ = check_live(other.broker)
    assert [(finding.code, finding.severity) for finding in findings if finding.code == "DP111"] == [("DP111", "error")]
    with other.working():
        pass
    said = [record for record in caplog.records if "Two services use the idempotency keys" in record.getMessage()]
    assert [(record.name, record.levelname) for record in said] == [("dramatiq_policies.alerts", "WARNING")]
    assert one.place.queue in said[0].getMessage()


def test_another_message_never_runs_beside_a_live_owner(application: Application) -> None:
    application.send("long", 7)
    with application.working():
        until(lambda: any(line.startswith("began") for line in application.lines()), 20, application.lines)
        for _ in range(3):
            application.send("long", 7)
        application.wait_for("outcome long succeeded None", "outcome long duplicate completed")
        until(lambda: application.lines()["outcome long duplicate completed"] == 3, 20, application.lines)
    assert sum(count for line, count in application.lines().items() if line.startswith("began")) == 1
    assert application.lines()["outcome long deferred running"] >= 3
    assert application.place.left() == []


def test_many_duplicates_of_a_running_job_stay_in_the_delay_queue_until_it_ends(place: Place) -> None:
    app = App(place, place.broker(), idempotency=Idempotency(MemoryStore(), lease=4_000))
    runs: list[int] = []
    over = threading.Event()

    @app.actor(idempotency_key="{number}")
    def held(number: int) -> None:
        runs.append(number)
        over.wait(60)

    with app.working():
        held.send(7)
        until(lambda: runs)
        for _ in range(200):
            held.send(7)
        until(lambda: app.outcomes.count("deferred") >= 200)
        before = len(app.events)
        # Each waits for a second at most, so each has been due several times by then.
        time.sleep(4)
        assert len(app.events) - before < 200
        held.send(8)
        until(lambda: 8 in runs)
        over.set()
        until(lambda: app.outcomes.count("duplicate") == 200, describe=lambda: Counter(app.outcomes))
    assert sorted(runs) == [7, 8]
    assert app.outcomes.count("succeeded") == 2
    assert place.left() == []


@pytest.mark.parametrize("place", ["redis"], indirect=True)
def test_the_messages_of_a_killed_worker_return_soon_on_redis(
    redis_place: RedisPlace, application: Application
) -> None:
    app = application
    broker = dramatiq.brokers.redis.RedisBroker(
        url=redis_place.url, namespace=redis_place.namespace, heartbeat_timeout=2_000
    )
    app.producer = broker
    ids = {app.send("plain", number).message_id for number in range(10)}
    # A worker that took them and was killed.
    stock = broker.consume(redis_place.queue, prefetch=20)
    taken = {next(stock).message_id for _ in ids}
    assert taken == ids
    killed = time.monotonic()
    with app.working():
        app.wait_for(*(f"effect {number}" for number in range(10)))
    # Four seconds, and what the command takes to start; Dramatiq's own maintenance takes minutes to an hour.
    assert time.monotonic() - killed < 25
    assert redis_place.left() == []


def test_a_live_but_busy_worker_keeps_its_messages(redis_place: RedisPlace) -> None:
    broker = dramatiq.brokers.redis.RedisBroker(
        url=redis_place.url, namespace=redis_place.namespace, heartbeat_timeout=1_000
    )
    first = redis_place.app(broker=broker)
    runs: list[int] = []
    first.broker.middleware  # noqa: B018

    @first.actor(max_crashes=None)
    def slow(number: int) -> None:
        runs.append(number)
        time.sleep(3)

    other = dramatiq.brokers.redis.RedisBroker(
        url=redis_place.url, namespace=redis_place.namespace, heartbeat_timeout=1_000
    )
    second = redis_place.app(broker=other)

    @second.actor(actor_name="slow")
    def stolen(number: int) -> None:
        runs.append(-number)

    with first.working(threads=1):
        slow.send(1)
        until(lambda: runs)
        with second.working():
            first.wait_for("succeeded")
    assert runs == [1]
    assert redis_place.left() == []


def test_a_group_counts_each_member_once_on_redis(redis_place: RedisPlace) -> None:
    backend = RedisBackend(url=redis_place.url)
    broker = redis_place.broker()
    broker.add_middleware(GroupCallbacks(backend))
    app = redis_place.app(broker=broker)
    done: list[str] = []
    go_on = threading.Event()

    @app.actor(idempotent=True)
    def member(number: int) -> None:
        if number == 2:
            assert go_on.wait(10)

    @app.actor()
    def finished() -> None:
        done.append("finished")

    members = [member.message(1), member.message(2)]
    together = group(members, broker=broker)
    together.add_completion_callback(finished.message())
    with app.working():
        together.run()
        until(lambda: len(app.events) == 1)
        # The first member's place is settled twice more, as after redeliveries of a job without a key.
        stock = next(m for m in broker.middleware if isinstance(m, GroupCallbacks))
        count = stock.counter()
        uuid_ = next(iter(members[0].options.values())) if members[0].options else None
        keys = [key.decode() for key in redis_place.client.scan_iter(match="*@members", count=5_000)]
        assert uuid_ is None or count is not None
        for key in keys:
            name = key.removesuffix("@members").strip("{}")
            if redis_place.client.sismember(key, members[0].message_id):
                assert count(name, members[0].message_id) is False
        assert done == []
        go_on.set()
        until(lambda: done == ["finished"])


# The store on a real server.


@pytest.mark.parametrize("decode", [False, True], ids=["bytes", "decode_responses"])
def test_a_store_works_over_a_client_that_decodes_and_one_that_does_not(
    redis_url: str, redis_namespace: str, decode: bool
) -> None:
    with redis.Redis.from_url(redis_url, decode_responses=decode) as client:
        store = RedisStore(client, namespace=redis_namespace)
        value = bytes(range(1, 30)) + b"\xff\xfe"
        assert store.swap("k", None, value, 10_000) is None
        found = store.swap("k", None, b"other", 10_000)
        assert found is not None
        assert found.value == value
        assert 9_000 < found.left <= 10_000
        assert store.get("k").value == value
        assert store.swap("k", value, b"next", 10_000) is None
        assert store.get("k").value == b"next"
        assert store.delete("k")


def test_scripts_are_loaded_again_after_a_flush_also_in_a_shared_round_trip(
    redis_url: str, redis_namespace: str
) -> None:
    with redis.Redis.from_url(redis_url) as client:
        store = RedisStore(client, namespace=redis_namespace)
        for _ in range(5):
            client.script_flush()
            assert together(16, store) == [None] * 16


def together(count: int, store: RedisStore) -> list[bytes | None]:
    """Return the reads of as many threads at the same moment."""
    barrier = threading.Barrier(count)

    def read(number: int) -> bytes | None:
        barrier.wait()
        return store.get(f"{number}").value

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(read, range(count)))


def test_the_default_store_of_a_redis_broker_has_its_own_connections_that_time_out(redis_place: RedisPlace) -> None:
    app = redis_place.app()
    idempotency = next(m for m in app.broker.middleware if isinstance(m, Idempotency))
    store: Any = idempotency.store
    assert store.client.connection_pool is not app.broker.client.connection_pool
    assert store.client.connection_pool.connection_kwargs["socket_timeout"] == 1.0
    assert store.client.ping()


def test_a_completed_key_takes_at_most_170_bytes(redis_client: redis.Redis, redis_namespace: str) -> None:
    from dramatiq_policies.idempotency.records import completed_by

    store = RedisStore(redis_client, namespace=redis_namespace)
    store.put("job\0" + "x" * 30, completed_by(str(uuid.uuid4())), 86_400_000)
    (key,) = redis_client.scan_iter(match=f"{redis_namespace}:*", count=5_000)
    usual = len("idem:") + 20
    assert len(key) - len(redis_namespace) + len("idem") == usual
    assert redis_client.memory_usage(key) < 170


def test_the_follow_up_messages_of_a_kept_message_are_enqueued_once_in_repeated_calls(
    redis_place: RedisPlace,
) -> None:
    app = redis_place.app()

    @app.actor(idempotency_key="{number}")
    def job(number: int) -> None:
        pass

    job.send(7)
    consumer = app.broker.consume(redis_place.queue)
    message = next(consumer)
    transport: Any = consumer.transport
    for _ in range(2):
        redis_id = message.options["redis_message_id"]
        transport.settling.run(redis_id, b"", [redis_place.queue, "next", message.encode()], keep_unacked=True)
    queued = redis_place.client.lrange(f"{redis_place.namespace}:{redis_place.queue}", 0, -1)
    assert queued == [b"next"]
    consumer.requeue([message])
    consumer.close()


def test_a_store_beside_a_sentinels_client_keeps_the_namespace() -> None:
    from redis.sentinel import Sentinel

    client = Sentinel([("127.0.0.1", 1)]).master_for("main")
    store = RedisStore.beside(client, namespace="shop:idem")
    assert store.namespace == "shop:idem"
    assert store.client.connection_pool.service_name == "main"
    assert store.client.connection_pool.is_master
