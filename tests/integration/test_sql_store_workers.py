"""Workers whose keys are in a database, on both brokers: duplicates, a worker that dies, a database that is away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
import sqlalchemy as sa
from dramatiq import Message

from dramatiq_policies import Idempotency
from dramatiq_policies.sql import SqlStore, create_tables
from tests.chaos.servers import DatabaseServer, MariadbServer, PostgresqlServer

from ..proxy import Proxy
from .databases import make_empty_tables, with_driver
from .places import Place, RedisPlace, until

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(database_url: str) -> Iterator[SqlStore]:
    engine = sa.create_engine(with_driver(database_url))
    store = SqlStore(engine, namespace="workers")
    yield store
    store.database.close()
    engine.dispose()


def test_messages_with_one_key_run_once(place: Place, store: SqlStore) -> None:
    app = place.app(idempotency=Idempotency(store))
    ran: Counter[int] = Counter()

    @app.actor(idempotency_key="charge:{order_id}")
    def charge(order_id: int) -> None:
        time.sleep(0.01)
        ran[order_id] += 1

    for order_id in range(10):
        for _ in range(3):
            charge.send(order_id)
    with app.working(threads=8):
        until(lambda: app.outcomes.count("succeeded") + app.outcomes.count("duplicate") == 30)
    assert ran == dict.fromkeys(range(10), 1)
    assert Idempotency.state(charge, 7).state == "completed"


def test_a_database_that_is_away_lets_jobs_with_keys_wait(place: Place, postgresql_url: str) -> None:
    make_empty_tables(postgresql_url)
    with Proxy.before(postgresql_url) as proxy:
        engine = sa.create_engine(with_driver(proxy.url))
        store = SqlStore(engine, namespace="away")
        app = place.app(idempotency=Idempotency(store))
        ran = threading.Event()

        @app.actor(idempotency_key="charge:{order_id}")
        def charge(order_id: int) -> None:
            ran.set()

        with app.working():
            proxy.refuse()
            proxy.cut()
            charge.send(7)
            until(lambda: "deferred" in app.outcomes)
            assert {(event.outcome.value, event.reason) for event in app.events} == {("deferred", "store_down")}
            assert not ran.is_set()
            proxy.accept()
            until(lambda: "succeeded" in app.outcomes)
        store.database.close()
        engine.dispose()


APP = """\
import os, signal, time
import dramatiq
import sqlalchemy as sa
from dramatiq.brokers.{kind} import {broker_class}
from dramatiq_policies import Idempotency, install
from dramatiq_policies.sql import SqlStore

engine = sa.create_engine(os.environ["APP_DATABASE"])
broker = {broker_class}(url=os.environ["APP_URL"]{arguments})
install(broker, idempotency=Idempotency(SqlStore(engine, namespace="killed")))
dramatiq.set_broker(broker)

def note(*words):
    with open(os.environ["APP_JOURNAL"], "a") as stream:
        stream.write(" ".join(map(str, words)) + "\\n")

@dramatiq.actor(queue_name="{queue}", idempotency_key="job:{{number}}")
def job(number):
    note("began", number)
    if number == 0 and open(os.environ["APP_JOURNAL"]).read().split("\\n").count("began 0") == 1:
        # A job killed between its effect and its record would run again.
        while any(Idempotency.state(job, other).state != "completed" for other in range(1, 5)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    note("done", number)
"""


def test_the_job_of_a_killed_worker_is_taken_over_and_no_other_runs_twice(
    place: Place, postgresql_url: str, tmp_path: Path
) -> None:
    make_empty_tables(postgresql_url)
    broker = place.broker()
    (tmp_path / "jobs_app.py").write_text(
        APP.format(
            kind=place.kind,
            broker_class=type(broker).__name__,
            arguments=f", namespace={place.namespace!r}, heartbeat_timeout=1_500"
            if isinstance(place, RedisPlace)
            else "",
            queue=place.queue,
        )
    )
    journal = tmp_path / "journal"
    journal.touch()
    environment = {
        **os.environ,
        "APP_URL": place.url,
        "APP_DATABASE": with_driver(postgresql_url),
        "APP_JOURNAL": str(journal),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
    }
    broker.declare_queue(place.queue)
    for job in range(5):
        for _ in range(2):
            broker.enqueue(Message(place.queue, "job", (job,), {}, {}))
    command = [sys.executable, "-m", "dramatiq", "jobs_app", "--processes", "1", "--threads", "2"]

    def lines() -> Counter[str]:
        return Counter(journal.read_text().splitlines())

    log = tmp_path / "log"
    with log.open("wb") as output:
        # A worker that dies ends its command; whatever supervises it starts it anew.
        for _ in range(2):
            process = subprocess.Popen(
                command, env=environment, cwd=tmp_path, stdout=output, stderr=output, start_new_session=True
            )
            try:
                until(
                    lambda process=process: (  # type: ignore[misc]
                        process.poll() is not None or all(lines()[f"done {job}"] for job in range(5))
                    ),
                    60,
                    lambda: (lines(), log.read_text()),
                )
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(60)
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    assert {line: times for line, times in lines().items() if line.startswith("done")} == {
        f"done {job}": 1 for job in range(5)
    }
    assert lines()["began 0"] == 2


# A server that is killed.


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(PostgresqlServer, marks=pytest.mark.postgresql, id="postgresql"),
        pytest.param(MariadbServer, marks=pytest.mark.mariadb, id="mariadb"),
    ],
)
def test_a_server_that_is_killed_and_comes_back_has_lost_no_key(kind: type[DatabaseServer]) -> None:
    assert kind.service.binary() is not None
    with closing(kind()) as server:
        server.start()
        engine = sa.create_engine(with_driver(server.url))
        create_tables(engine)
        store = SqlStore(engine)
        taken = [key for key in map(str, range(50)) if store.swap(key, None, b"one", 600_000) is None]
        server.kill()
        with pytest.raises((sa.exc.DBAPIError, OSError)):
            store.get("0")
        server.start()
        assert all(store.get(key).value == b"one" for key in taken)
        assert store.swap("0", b"one", b"two", 600_000) is None
        store.database.close()
        engine.dispose()
