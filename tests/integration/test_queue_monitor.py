"""The monitor and the heartbeat beside real workers: one per command, one per fleet, and through outages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dramatiq
import pytest
import redis
import sqlalchemy as sa
from dramatiq import Worker
from dramatiq.brokers.redis import RedisBroker

from dramatiq_policies import Idempotency, QueueAlert, QueueMonitor, Threshold, install
from dramatiq_policies.observability.election import CommandElection
from dramatiq_policies.observability.fleet_election import FleetElection
from dramatiq_policies.sql import SqlOutbox, create_tables
from dramatiq_policies.stores.redis import RedisStore
from tests.proxy import Proxy

from .places import PATIENCE, Gate, Place, RabbitmqPlace, RedisPlace, until
from .test_processes import Application

#: The file that says when the jobs may end is shared by all processes.
APP = """
import os, pathlib, time
import dramatiq
from dramatiq.brokers.{kind} import {broker_class}
from dramatiq_policies import Heartbeat, QueueMonitor, Threshold, Timeout, install

journal = pathlib.Path(os.environ["APP_JOURNAL"])
gate = journal.with_name("open")

def note(*words):
    with journal.open("a") as stream:
        stream.write(" ".join(map(str, words)) + "\\n")

def tell(alert):
    note("cleared" if alert.cleared else "breach", alert.measure, os.getpid())

broker = {broker_class}(url=os.environ["APP_URL"]{arguments})
monitor = QueueMonitor(
    interval=200,
    thresholds={{"{queue}": Threshold(ready=10, stalled=1_000, notify_clear=True)}},
    on_alert=[tell, "log"],
)
heartbeat = Heartbeat(journal.with_name("alive"), interval=100, silence=1_500)
install(broker, queue_monitor=monitor, heartbeat=heartbeat, timeout=Timeout(grace=200))
dramatiq.set_broker(broker)

@dramatiq.actor(queue_name="{queue}")
def patient(number):
    note("began", number, os.getpid())
    while not gate.exists():
        time.sleep(0.02)

@dramatiq.actor(queue_name="{queue}", timeout=300, max_retries=0)
def stuck(number):
    note("began", number, os.getpid())
    time.sleep(6)
"""


class Watched(Application):
    def __init__(self, place: Place, folder: Path) -> None:
        super().__init__(place, folder)
        self.module.write_text(
            APP.format(
                kind=place.kind,
                broker_class=type(place.broker()).__name__,
                arguments=f", namespace={place.namespace!r}" if isinstance(place, RedisPlace) else "",
                queue=place.queue,
            )
        )
        self.alive = folder / "alive"
        self.environment["dramatiq_restart_delay"] = "200"

    def open(self) -> None:
        (self.folder / "open").touch()

    def told(self, *words: str) -> list[str]:
        """The lines that begin with these words."""
        return [line for line in self.journal.read_text().splitlines() if line.startswith(" ".join(words))]

    def run(self, command: list[str | Path]) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command, env=self.environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        self.running.append(process)
        return process

    def monitor(self) -> subprocess.Popen[bytes]:
        """The monitor as a process of its own."""
        return self.run([sys.executable, "-m", "dramatiq_policies", "monitor", "jobs_app"])

    def beats(self, seconds: float = 1.0) -> bool:
        before = self.alive.stat().st_mtime_ns if self.alive.exists() else 0
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.alive.exists() and self.alive.stat().st_mtime_ns != before:
                return True
            time.sleep(0.02)
        return False


@pytest.fixture
def application(place: Place, tmp_path: Path):
    made = Watched(place, tmp_path)
    yield made
    made.close()


def lock_files(process: subprocess.Popen[bytes]) -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"dramatiq-policies-{os.getuid()}/*{process.pid}-queues-*"))


def test_a_single_process_of_a_command_monitors_and_ends_with_its_command(place: Place, application: Watched) -> None:
    for n in range(60):
        application.send("patient", n)
    process = application.start("--processes", "3")
    until(lambda: application.told("breach ready"), 60, application.log.read_text)
    # Each of the three has read, or asked who does, several times more.
    time.sleep(1.5)
    assert len(application.told("breach ready")) == 1, application.journal.read_text()
    if isinstance(place, RabbitmqPlace):
        assert lock_files(process)
    application.open()
    until(lambda: application.told("cleared ready"), 60, application.log.read_text)
    assert len(application.told("cleared ready")) == 1
    application.stop(process)
    assert lock_files(process) == []


def test_a_single_monitor_on_redis_serves_the_fleet_and_another_takes_over(
    redis_place: RedisPlace, tmp_path: Path
) -> None:
    application = Watched(redis_place, tmp_path)
    try:
        for n in range(80):
            application.send("patient", n)
        first, second = (application.start("--processes", "2") for _ in range(2))
        until(lambda: application.told("breach ready"), 60, application.log.read_text)
        time.sleep(1.5)
        assert len(application.told("breach ready")) == 1
        watcher = int(application.told("breach ready")[0].split()[-1])
        dying, staying = (first, second) if os.getpgid(watcher) == first.pid else (second, first)
        os.killpg(dying.pid, signal.SIGKILL)
        dying.wait()
        # A reported breach is not reported again; its end is.
        time.sleep(2)
        assert len(application.told("breach ready")) == 1
        application.open()
        until(lambda: application.told("cleared ready"), 60, application.log.read_text)
        assert os.getpgid(int(application.told("cleared ready")[0].split()[-1])) == staying.pid
        application.stop(staying)
    finally:
        application.close()


def test_a_process_of_its_own_warns_when_no_worker_lives(place: Place, application: Watched) -> None:
    place.app().broker.declare_queue(place.queue)
    application.send("patient", 1)
    process = application.monitor()
    until(lambda: application.told("breach stalled"), 60, application.log.read_text)
    assert not application.told("began")
    application.stop(process)


def test_under_gevent_it_watches_and_the_heart_beats(place: Place, application: Watched) -> None:
    for n in range(200):
        application.send("patient", n)
    command = [Path(sys.executable).with_name("dramatiq-gevent"), "jobs_app", "--processes", "1", "--threads", "2"]
    process = application.run(command)
    until(lambda: application.told("breach ready"), 60, application.log.read_text)
    until(application.beats, 60, application.log.read_text)
    application.open()
    until(lambda: application.told("cleared ready"), 60, application.log.read_text)
    application.stop(process)


# For a tracer it is the workers that are too slow.
@pytest.mark.untraced
def test_jobs_that_take_long_are_not_stalled_while_others_are_taken(place: Place, application: Watched) -> None:
    application.open()
    process = application.start("--processes", "2")
    until(application.beats, 20)
    deadline = time.monotonic() + 3
    n = 0
    while time.monotonic() < deadline:
        n += 1
        application.send("patient", n)
        time.sleep(0.01)
    application.stop(process)
    assert application.told("breach stalled") == []


class Client:
    def __init__(self) -> None:
        self.gauges: dict[str, float] = {}

    incr = timing = None

    def gauge(self, name: str, value: float) -> None:
        self.gauges[name] = value


def test_on_redis_the_workers_of_the_whole_fleet_are_counted_and_none_when_all_are_gone(
    redis_place: RedisPlace,
) -> None:
    client, gate = Client(), Gate()

    def monitored() -> tuple[QueueMonitor, dramatiq.Broker]:
        monitor = QueueMonitor(interval=50, client=client)
        return monitor, install(redis_place.broker(), queue_monitor=monitor)

    alone, broker = monitored()
    broker.declare_queue(redis_place.queue)
    stop = threading.Event()
    thread = threading.Thread(target=alone.run_forever, args=(stop,))
    thread.start()
    workers = []
    try:
        until(lambda: client.gauges.get("workers.threads") == 0)
        for threads in (1, 2):
            _, broker = monitored()

            @dramatiq.actor(broker=broker, queue_name=redis_place.queue)
            def job() -> None:
                gate()

            workers.append(Worker(broker, worker_timeout=50, worker_threads=threads))
            workers[-1].start()
        until(lambda: client.gauges["workers.threads"] == 3)
        for _ in range(20):
            job.send()
        until(lambda: client.gauges["workers.busy"] == 3)
        gate.open.set()
        until(lambda: client.gauges["workers.busy"] == 0)
        for worker in workers:
            worker.stop()
        until(lambda: client.gauges["workers.threads"] == 0)
    finally:
        gate.open.set()
        stop.set()
        thread.join(PATIENCE)


def test_a_single_reading_leaves_no_connection_behind(place: Place) -> None:
    broker = install(place.broker(), queue_monitor=QueueMonitor(thresholds={"*": Threshold(ready=2)}, on_alert="log"))
    monitor = next(one for one in broker.middleware if isinstance(one, QueueMonitor))

    @dramatiq.actor(broker=broker, queue_name=place.queue)
    def job() -> None:
        pass

    for _ in range(2):
        job.send()
    (alert,) = until(monitor.check)
    assert (alert.queue, alert.measure, alert.value) == (place.queue, "ready", 2)
    connection = "_client" if isinstance(place, RedisPlace) else "_connection"
    assert getattr(monitor._reader, connection) is None
    assert monitor.check() == []


def test_a_monitor_reads_again_when_the_broker_is_back(place: Place, quick_restarts: None) -> None:
    told: list[object] = []
    with Proxy.before(place.url) as proxy:
        monitor = QueueMonitor(interval=50, thresholds={"*": Threshold(ready=3)}, on_alert=told.append)
        broker = place.broker(proxy.url)
        install(broker, queue_monitor=monitor)
        gate = Gate()

        @dramatiq.actor(broker=broker, queue_name=place.queue)
        def job() -> None:
            gate()

        worker = Worker(broker, worker_timeout=50, worker_threads=1)
        worker.start()
        try:
            until(lambda: monitor._reader is not None)
            proxy.refuse()
            proxy.cut()
            time.sleep(0.5)
            producer = place.broker()
            for _ in range(12):
                producer.enqueue(job.message())
            assert told == []
            proxy.accept()
            until(lambda: told)
        finally:
            gate.open.set()
            worker.stop()
            broker.close()
    assert len(told) == 1
    assert "dramatiq-policies-queue-monitor" not in {thread.name for thread in threading.enumerate()}


def test_the_outbox_alerts_while_the_broker_is_away(place: Place, tmp_path: Path) -> None:
    told: list[QueueAlert] = []
    engine = sa.create_engine(f"sqlite:///{tmp_path}/outbox.db")
    create_tables(engine)
    outbox = SqlOutbox(engine, wait=0)
    with Proxy.before(place.url) as proxy:
        monitor = QueueMonitor(interval=50, outbox=Threshold(ready=3), on_alert=told.append)
        broker = place.broker(proxy.url)
        install(broker, outbox=outbox, queue_monitor=monitor)
        job = dramatiq.actor(print, broker=broker, actor_name="job", queue_name=place.queue)
        stop = threading.Event()
        thread = threading.Thread(target=monitor.run_forever, args=(stop,))
        thread.start()
        try:
            until(lambda: monitor._elected)
            proxy.refuse()
            proxy.cut()
            with engine.begin() as connection, outbox.within(connection):
                for number in range(3):
                    job.send(number)
            until(lambda: told)
            # Also after it has left its turn to others, and come back.
            failed = monitor._failed
            until(lambda: monitor._failed >= failed + 5)
        finally:
            stop.set()
            thread.join(PATIENCE)
            broker.close()
            engine.dispose()
    assert [(alert.queue, alert.measure, alert.value) for alert in told] == [("outbox", "ready", 3)]


@contextmanager
def watching(*brokers: Any, store: RedisStore, queue: str) -> Iterator[list[tuple[QueueMonitor, threading.Event]]]:
    """A monitor for each broker, on a thread of its own, with its lease on the store's Redis."""
    running, threads = [], []
    for broker in brokers:
        monitor, stop = QueueMonitor(interval=50), threading.Event()
        install(broker, idempotency=Idempotency(store), queue_monitor=monitor)
        broker.declare_queue(queue)
        running.append((monitor, stop))
        threads.append(threading.Thread(target=monitor.run_forever, args=(stop,)))
    try:
        for thread in threads:
            thread.start()
        yield running
    finally:
        for (_, stop), thread in zip(running, threads, strict=True):
            stop.set()
            thread.join(PATIENCE)


def test_on_rabbitmq_the_lease_is_on_the_redis_of_a_store(
    rabbitmq_place: RabbitmqPlace, redis_client, redis_namespace: str
) -> None:
    store = RedisStore(redis_client, namespace=redis_namespace)
    brokers = [rabbitmq_place.broker() for _ in range(2)]
    with watching(*brokers, store=store, queue=rabbitmq_place.queue) as running:
        until(lambda: any(monitor._elected for monitor, _ in running))
        time.sleep(0.3)
        elected = [monitor._elected for monitor, _ in running]
        assert elected.count(True) == 1
        running[elected.index(True)][1].set()
        until(lambda: running[elected.index(False)][0]._elected)


def test_a_leader_that_reaches_no_queue_leaves_the_lease_to_a_monitor_that_does(
    rabbitmq_place: RabbitmqPlace, redis_client, redis_namespace: str
) -> None:
    store = RedisStore(redis_client, namespace=redis_namespace)
    queue = rabbitmq_place.queue
    with Proxy.before(rabbitmq_place.url) as proxy:
        far, fallback = rabbitmq_place.broker(proxy.url), rabbitmq_place.broker()
        with watching(far, store=store, queue=queue) as ((cut_off, _),):
            until(lambda: cut_off._elected)
            proxy.refuse()
            proxy.cut()
            with watching(fallback, store=store, queue=queue) as ((reading, _),):
                until(lambda: reading._elected)
                time.sleep(0.5)
                assert (reading._elected, cut_off._elected) == (True, False)
            proxy.accept()


def test_the_heartbeat_stops_while_every_thread_of_one_process_is_stuck(place: Place, application: Watched) -> None:
    process = application.start("--processes", "2", "--threads", "1")
    until(application.beats, 60, application.log.read_text)
    application.send("stuck", 1)
    until(lambda: application.told("began 1"))
    until(lambda: not application.beats(), 5, application.log.read_text)
    until(application.beats, 60, application.log.read_text)
    application.stop(process)


def test_the_heartbeat_goes_on_while_the_broker_is_away(place: Place, tmp_path: Path) -> None:
    with Proxy.before(place.url) as proxy:
        application = Watched(place, tmp_path)
        application.environment["APP_URL"] = proxy.url
        try:
            process = application.start("--processes", "1")
            until(application.beats, 60, application.log.read_text)
            proxy.refuse()
            proxy.cut()
            # Longer than a consumer may be silent.
            deadline = time.monotonic() + 3
            while time.monotonic() < deadline:
                assert application.beats(), application.log.read_text()
            proxy.accept()
            application.open()
            application.send("patient", 1)
            until(lambda: application.told("began 1"), 60, application.log.read_text)
            application.stop(process)
        finally:
            application.close()


def test_the_heartbeat_goes_on_while_the_broker_hangs(place: Place, tmp_path: Path) -> None:
    with Proxy.before(place.url) as proxy:
        application = Watched(place, tmp_path)
        application.environment["APP_URL"] = proxy.url
        try:
            process = application.start("--processes", "1")
            until(application.beats, 60, application.log.read_text)
            proxy.stall()
            # Longer than a consumer may be silent; from then on each beat waits for an answer that does not come.
            time.sleep(3)
            assert application.beats(30), application.log.read_text()
            proxy.resume()
            application.open()
            application.send("patient", 1)
            until(lambda: application.told("began 1"), 60, application.log.read_text)
            application.stop(process)
        finally:
            application.close()


def test_each_command_has_a_monitor_while_the_store_s_redis_is_away(
    redis_url: str, redis_namespace: str, tmp_path: Path
) -> None:

    with Proxy.before(redis_url) as proxy:

        def election() -> FleetElection:
            client = redis.Redis.from_url(proxy.url, retry=None)
            fallback = CommandElection("queues", 1, folder=str(tmp_path))
            return FleetElection(client, f"{redis_namespace}:monitor", fallback, fresh_ms=60_000)

        first, second = election(), election()
        assert (first.is_leader(), second.is_leader()) == (True, False)
        first.save([["mail", "ready"]])
        assert second.saved() == [["mail", "ready"]]
        proxy.refuse()
        proxy.cut()
        first.publish({"threads": 8})
        # Two of one process share its lock; that one of several has it is shown in tests/observability/test_election.py.
        assert first.is_leader()
        assert first.reports() == [{"threads": 8}]
        # Of the last leader of this command.
        assert second.saved() == [["mail", "ready"]]
        proxy.accept()
        assert (first.is_leader(), second.is_leader()) == (True, False)
        first.resign()
        assert second.is_leader()
        second.resign()


#: Texts of others among the reports of a fleet, or in the place of its memory.
ODD = [b"{", b"5", b"[1, 2]", b"null", b"[[], {}]", b"\xff", b'[1e18, {"busy": "x", "held": 5, "taken": {"mail": 1}}]']


@pytest.mark.parametrize("decodes", [False, True])
def test_odd_notes_and_an_odd_memory_end_no_alert_of_the_fleet(
    redis_url: str, redis_namespace: str, tmp_path: Path, decodes: bool
) -> None:
    broker = RedisBroker(url=redis_url, namespace=redis_namespace)
    told: list[QueueAlert] = []
    monitor = QueueMonitor(interval=100, thresholds={"*": Threshold(ready=1)}, on_alert=told.append)
    install(broker, queue_monitor=monitor)

    @dramatiq.actor(broker=broker, queue_name="mail")
    def job() -> None: ...

    client = redis.Redis.from_url(redis_url, decode_responses=decodes)
    key = f"{redis_namespace}:monitor"
    for number, odd in enumerate(ODD):
        broker.client.hset(f"{key}:notes", f"other:{number}", odd)
    broker.client.set(f"{key}:memory", b'[["mail"], 5, {}]')
    fallback = CommandElection("queues", 1, folder=str(tmp_path))
    job.send()
    monitor._monitor_once(FleetElection(client, key, fallback, fresh_ms=60_000))
    assert [(alert.queue, alert.measure) for alert in told] == [("mail", "ready")]
    client.close()
