"""The ``dramatiq`` command as it is run in production: its processes, their signals and their deaths."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from dramatiq import Message

import dramatiq_policies

from .places import Place, RabbitmqPlace, RedisPlace, until

APP = """
import os, pathlib, time
import dramatiq
from dramatiq.brokers.{kind} import {broker_class}
from dramatiq_policies import RetryPolicy, constant, install

class Transient(Exception):
    pass

broker = {broker_class}(url=os.environ["APP_URL"]{arguments})
install(broker)
retrying = dict(retry_on={{Transient: RetryPolicy(attempts=4, wait=constant(300))}})
dramatiq.set_broker(broker)
journal = pathlib.Path(os.environ["APP_JOURNAL"])

def note(*words):
    with journal.open("a") as stream:
        stream.write(" ".join(map(str, words)) + "\\n")

@dramatiq.actor(queue_name="{queue}")
def job(number):
    note("done", number)

@dramatiq.actor(queue_name="{queue}", **retrying)
def flaky(number, fails):
    note("tried", number)
    if len([line for line in journal.read_text().splitlines() if line == f"tried {{number}}"]) <= fails:
        raise Transient(number)
    note("done", number)

@dramatiq.actor(queue_name="{queue}", max_retries=0)
def hopeless(number):
    raise Transient(number)

@dramatiq.actor(queue_name="{queue}", notify_shutdown=True)
def long(number):
    note("began", number, os.getpid())
    if len([line for line in journal.read_text().splitlines() if line.startswith(f"began {{number}} ")]) == 1:
        for _ in range(3000):
            time.sleep(0.01)
    note("done", number)
"""


class Application:
    """An app module of its own in a folder of its own, run by the command or used from here."""

    def __init__(self, place: Place, folder: Path) -> None:
        self.place = place
        self.folder = folder
        self.producer = place.app().broker
        self.journal = folder / "journal"
        self.journal.touch()
        self.module = folder / "jobs_app.py"
        self.module.write_text(
            APP.format(
                kind=place.kind,
                broker_class=type(place.broker()).__name__,
                arguments=f", namespace={place.namespace!r}" if isinstance(place, RedisPlace) else "",
                queue=place.queue,
            )
        )
        self.environment = {
            **os.environ,
            "APP_URL": place.url,
            "APP_JOURNAL": str(self.journal),
            "PYTHONPATH": os.pathsep.join([str(folder), str(Path(dramatiq_policies.__file__).parents[1])]),
        }
        self.running: list[subprocess.Popen[bytes]] = []
        self.log = folder / "jobs_app.log"

    def send(self, actor: str, *args: object, delay: int | None = None) -> None:
        """As a process with the same broker does."""
        self.producer.enqueue(Message(self.place.queue, actor, args, {}, {}), delay=delay)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dramatiq", "jobs_app", "--processes", "1", "--threads", "2", *arguments],
                env=self.environment,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.running.append(process)
        return process

    def stop(self, process: subprocess.Popen[bytes], code: int = 0) -> None:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == code, self.log.read_text()

    def lines(self) -> Counter[str]:
        return Counter(self.journal.read_text().splitlines())

    def wait_for(self, *lines: str) -> None:
        until(lambda: self.lines().keys() >= set(lines), 60, lambda: (self.lines(), self.log.read_text()))

    def pid(self, number: int) -> int:
        """The process in which ``long(number)`` began last."""
        found = [
            line.split()[2] for line in self.journal.read_text().splitlines() if line.startswith(f"began {number} ")
        ]
        return int(found[-1])

    def close(self) -> None:
        for process in self.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture
def make(place: Place, tmp_path: Path):
    made = []

    def application() -> Application:
        made.append(Application(place, tmp_path))
        return made[-1]

    yield application
    for one in made:
        one.close()


def test_jobs_run_under_the_command_and_it_stops_cleanly(place: Place, make) -> None:
    application = make()
    for n in range(20):
        application.send("job", n)
    for n in range(100, 110):
        application.send("flaky", n, 1)
    application.send("job", 50, delay=300)
    application.send("hopeless", 0)
    process = application.start()
    expected = [f"done {n}" for n in (*range(20), *range(100, 110), 50)]
    application.wait_for(*expected)
    application.stop(process)

    assert [application.lines()[line] for line in expected] == [1] * len(expected)
    (letter,) = place.dead()
    assert letter.actor_name == "hopeless"
    assert letter.options["failure"]["reason"] == "unclassified"
    assert place.left() == []


def test_a_shutdown_puts_the_job_under_way_back(place: Place, make) -> None:
    application = make()
    for n in (101, 102):
        application.send("long", n)
    for n in range(10):
        application.send("job", n)
    process = application.start()
    until(lambda: sum(line.startswith("began") for line in application.lines()) == 2)
    application.stop(process)
    assert not any(line.startswith("done") for line in application.lines())
    left = place.left() if isinstance(place, RedisPlace) else None
    if left is not None:
        assert len(left) == 12
        assert place.unacked() == 0

    process = application.start()
    expected = [f"done {n}" for n in (101, 102, *range(10))]
    application.wait_for(*expected)
    application.stop(process)
    assert [application.lines()[line] for line in expected] == [1] * len(expected)
    assert place.left() == []
    assert place.dead() == []


def test_an_idle_thread_does_not_begin_a_job_again_that_the_shutdown_has_requeued(place: Place, make) -> None:
    application = make()
    application.send("long", 1)
    process = application.start("--threads", "8")
    until(lambda: any(line.startswith("began") for line in application.lines()))
    application.stop(process)
    assert [line for line in application.lines().elements() if not line.startswith("began 1 ")] == []

    process = application.start()
    application.wait_for("done 1")
    application.stop(process)
    assert application.lines()["done 1"] == 1
    assert place.left() == []


def test_a_killed_worker_s_job_is_delivered_again(place: Place, make) -> None:
    application = make()
    application.send("long", 100)
    for n in range(10):
        application.send("job", n)
    process = application.start()
    until(lambda: any(line.startswith("began") for line in application.lines()))
    application.wait_for(*[f"done {n}" for n in range(10)])
    os.kill(application.pid(100), signal.SIGKILL)
    assert process.wait(60) != 0
    assert application.lines()["done 100"] == 0

    if isinstance(place, RedisPlace):
        # It comes back when the process has been silent for heartbeat_timeout, a minute; nobody waits for that here.
        (left,) = place.left()
        assert left.args == (100,)
        assert place.unacked() == 1
        broker = place.broker()
        broker.heartbeat_timeout, broker.maintenance_chance = 1, 1_000_000
        time.sleep(0.01)
        until(lambda: broker.do_requeue(place.queue) or place.client.llen(place.key(place.queue)))
    process = application.start()
    application.wait_for("done 100")
    application.stop(process)
    assert application.lines()["done 100"] == 1
    assert place.left() == []
    assert place.dead() == []


def ends_for_good(application: Application) -> None:
    """It says once that Redis refuses it, and ends."""
    try:
        process = application.start()
        assert process.wait(60) == 3, application.log.read_text()
    finally:
        application.close()
    refused = [line for line in application.log.read_text().splitlines() if "permanently refuses this worker" in line]
    assert len(refused) == 1, application.log.read_text()


def test_a_password_that_redis_refuses_ends_the_process(redis_place: RedisPlace, tmp_path: Path) -> None:
    application = Application(redis_place, tmp_path)
    scheme, _, rest = redis_place.url.partition("://")
    application.environment["APP_URL"] = f"{scheme}://nobody:wrong@{rest.rpartition('@')[2]}"
    ends_for_good(application)


def test_a_key_of_the_wrong_type_ends_the_process(redis_place: RedisPlace, tmp_path: Path) -> None:
    application = Application(redis_place, tmp_path)
    redis_place.client.set(redis_place.key(redis_place.queue), "somebody's string")
    ends_for_good(application)


def test_a_killed_worker_loses_no_message_at_any_moment(rabbitmq_place: RabbitmqPlace, tmp_path: Path) -> None:
    application = Application(rabbitmq_place, tmp_path)
    try:
        for n in range(200):
            application.send("flaky", n, 1)
        process = application.start()
        until(lambda: sum(line.startswith("tried") for line in application.lines().elements()) > 80, 20)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process = application.start()
        application.wait_for(*[f"done {n}" for n in range(200)])
        application.stop(process)
    finally:
        application.close()
    assert rabbitmq_place.dead() == []
