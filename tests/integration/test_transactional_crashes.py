"""Workers of transactional jobs that are killed or frozen, on every broker: each effect is there exactly once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from dramatiq import Message, pipeline

import dramatiq_policies

from .databases import with_driver
from .places import Place, RedisPlace, until

#: The orders of which the worker is killed once, and where.
IN_JOB, AT_COMMIT, AFTER_COMMIT, BEFORE_ACK, FROZEN, FROZEN_AT_COMMIT = range(6)

APP = """
import os, pathlib, signal, threading, time
import dramatiq, sqlalchemy as sa
from dramatiq.brokers.{kind} import {broker_class}
from dramatiq.middleware import Middleware
from sqlalchemy.orm import Session
from dramatiq_policies import Idempotency, RetryPolicy, TimeoutExceeded, current_job, install
from dramatiq_policies.sql import SqlOutbox, SqlStore

began = time.monotonic()
folder = pathlib.Path(os.environ["APP_FOLDER"])

def once(name):
    try:
        (folder / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True

def die(point, order):
    if order == point and once(f"died{{point}}"):
        # Dramatiq's main process waits forever if a worker dies while it reports its boot.
        time.sleep(max(0, began + 1 - time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)

def freeze(point, order):
    if order == point and once("frozen"):
        (folder / "pid").write_text(str(os.getpid()))
        while not (folder / "go").exists():
            time.sleep(0.01)

class BeforeAck(Middleware):
    def before_process_message(self, broker, message):
        current.order = message.args[0] if message.actor_name == "pay" else None

    def after_process_message(self, broker, message, *, result=None, exception=None):
        if message.actor_name == "pay":
            die({before_ack}, message.args[0])
        current.order = None

current = threading.local()
engine = sa.create_engine(os.environ["APP_DATABASE"])
broker = {broker_class}(url=os.environ["APP_URL"]{arguments})
broker.add_middleware(BeforeAck())
install(
    broker,
    idempotency=Idempotency(SqlStore(engine, namespace="{queue}"), lease=2_000),
    outbox=SqlOutbox(engine, namespace="{namespace}", lease=1_000),
)
dramatiq.set_broker(broker)

if {transactional}:
    do_commit = engine.dialect.do_commit
    def commit(connection):
        # The store and the outbox have threads of their own.
        order = getattr(current, "order", None)
        die({at_commit}, order)
        freeze({frozen_at_commit}, order)
        do_commit(connection)
        die({after_commit}, order)
    engine.dialect.do_commit = commit

def insert(session, table, order):
    session.execute(sa.text(f"INSERT INTO {{table}} (number) VALUES (:number)"), {{"number": order}})

@dramatiq.actor(queue_name="{queue}", idempotency_key="{{order}}", transactional={transactional})
def pay(order):
    if {transactional}:
        insert(current_job().session, "paid", order)
        receipt.send(order)
    else:
        with Session(engine) as session, session.begin():
            insert(session, "paid", order)
        receipt.send(order)
    die({in_job}, order)
    freeze({frozen}, order)
    return order

@dramatiq.actor(queue_name="{queue}", idempotent=True, transactional=True)
def receipt(order):
    insert(current_job().session, "receipts", order)

@dramatiq.actor(
    queue_name="{queue}",
    idempotent=True,
    transactional=True,
    timeout=500,
    retry_on={{TimeoutExceeded: RetryPolicy(attempts=2, wait=100)}},
)
def slow(order):
    insert(current_job().session, "paid", order)
    receipt.send(order)
    time.sleep(30 if current_job().attempt == 1 else 0)

@dramatiq.actor(queue_name="{queue}", idempotent=True, transactional=True)
def ship(order):
    insert(current_job().session, "shipped", order)
"""

TABLES = ("paid", "receipts", "shipped")


class Shop:
    """The application, its workers as processes, and its database."""

    def __init__(self, place: Place, url: str, folder: Path, *, transactional: bool = True) -> None:
        self.place = place
        self.folder = folder
        self.engine = sa.create_engine(with_driver(url))
        with self.engine.begin() as connection:
            for table in TABLES:
                connection.execute(sa.text(f"DROP TABLE IF EXISTS {table}"))
                connection.execute(sa.text(f"CREATE TABLE {table} (number INT NOT NULL)"))
        self.producer = place.app().broker
        is_redis = isinstance(place, RedisPlace)
        (folder / "shop_app.py").write_text(
            APP.format(
                kind=place.kind,
                broker_class=type(place.broker()).__name__,
                arguments=f", namespace={place.namespace!r}, heartbeat_timeout=1500" if is_redis else "",
                queue=place.queue,
                namespace=place.queue[-12:],
                transactional=transactional,
                in_job=IN_JOB,
                at_commit=AT_COMMIT,
                after_commit=AFTER_COMMIT,
                before_ack=BEFORE_ACK,
                frozen=FROZEN,
                frozen_at_commit=FROZEN_AT_COMMIT,
            )
        )
        self.environment = {
            **os.environ,
            # RabbitMQ closes the connection of a process that is silent for longer.
            "APP_URL": place.url if is_redis else f"{place.url}?heartbeat=2",
            "APP_DATABASE": with_driver(url),
            "APP_FOLDER": str(folder),
            "PYTHONPATH": os.pathsep.join([str(folder), str(Path(dramatiq_policies.__file__).parents[1])]),
        }
        self.running: list[subprocess.Popen[bytes]] = []
        self.log = folder / "shop_app.log"

    def send(self, order: int) -> None:
        """Send a payment, and the shipping as the next stage of the pipeline."""
        messages = [Message(self.place.queue, name, args, {}, {}) for name, args in (("pay", (order,)), ("ship", ()))]
        pipeline(messages, broker=self.producer).run()

    def start(self, command: str = "dramatiq") -> subprocess.Popen[bytes]:
        script = str(Path(sys.executable).with_name(command))
        command_line = [sys.executable, script, "shop_app", "--processes", "1", "--threads", "1"]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command_line, env=self.environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        self.running.append(process)
        return process

    def rows(self) -> dict[str, list[int]]:
        with self.engine.connect() as connection:
            return {
                table: sorted(connection.execute(sa.text(f"SELECT number FROM {table}")).scalars()) for table in TABLES
            }

    def work_until(self, condition: Callable[[], bool]) -> None:
        """Work, with a new worker whenever one has died."""

        def done() -> bool:
            if self.running[-1].poll() is not None:
                self.start()
            return condition()

        until(done, 90, lambda: (self.rows(), self.log.read_text()[-4_000:]))

    def stop(self) -> None:
        process = self.running[-1]
        process.terminate()
        process.wait(30)

    def close(self) -> None:
        for process in self.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.engine.dispose()


@pytest.fixture
def open_shop(place: Place, server_url: str, tmp_path: Path) -> Iterator[Any]:
    shops = []

    def make(**options: bool) -> Shop:
        shops.append(Shop(place, server_url, tmp_path, **options))
        return shops[-1]

    yield make
    for shop in shops:
        shop.close()


def test_a_worker_that_is_killed_anywhere_loses_and_doubles_nothing(open_shop):
    shop = open_shop()
    orders = [IN_JOB, AT_COMMIT, AFTER_COMMIT, BEFORE_ACK, 10]
    for order in orders:
        shop.send(order)
    shop.start()
    shop.work_until(lambda: all(len(rows) >= len(orders) for rows in shop.rows().values()))
    assert {path.name for path in shop.folder.glob("died*")} == {f"died{point}" for point in orders[:4]}
    # A second copy would be there by now: the next message is behind all of them in the queue.
    shop.send(11)
    shop.work_until(lambda: all(11 in rows for rows in shop.rows().values()))
    shop.stop()
    assert shop.rows() == {table: [*orders, 11] for table in TABLES}


def test_a_frozen_worker_whose_job_was_taken_over_leaves_nothing(open_shop):
    shop = open_shop()
    shop.send(FROZEN)
    first = shop.start()
    until((shop.folder / "pid").exists, 60, shop.log.read_text)
    os.killpg(first.pid, signal.SIGSTOP)
    try:
        shop.start()
        shop.work_until(lambda: all(rows == [FROZEN] for rows in shop.rows().values()))
        (shop.folder / "go").touch()
    finally:
        os.killpg(first.pid, signal.SIGCONT)
    until(lambda: "was rolled back" in shop.log.read_text(), 60, shop.log.read_text)
    shop.send(11)
    shop.work_until(lambda: all(11 in rows for rows in shop.rows().values()))
    assert shop.rows() == {table: [FROZEN, 11] for table in TABLES}


def test_a_worker_that_is_frozen_with_its_key_completed_and_not_committed_keeps_others_out(open_shop):
    shop = open_shop()
    shop.send(FROZEN_AT_COMMIT)
    first = shop.start()
    until((shop.folder / "pid").exists, 60, shop.log.read_text)
    os.killpg(first.pid, signal.SIGSTOP)
    try:
        shop.start()
        # The second worker has the message, and waits for the key.
        until(lambda: "deferred: message" in shop.log.read_text(), 60, shop.log.read_text)
        assert shop.rows() == {table: [] for table in TABLES}
        (shop.folder / "go").touch()
    finally:
        os.killpg(first.pid, signal.SIGCONT)
    shop.work_until(lambda: all(rows == [FROZEN_AT_COMMIT] for rows in shop.rows().values()))
    shop.send(11)
    shop.work_until(lambda: all(11 in rows for rows in shop.rows().values()))
    assert shop.rows() == {table: [FROZEN_AT_COMMIT, 11] for table in TABLES}


@pytest.mark.parametrize("server_url", ["postgresql"], indirect=True)
def test_a_plain_job_with_its_own_commit_doubles_its_effect(open_shop):
    shop = open_shop(transactional=False)
    shop.send(IN_JOB)
    shop.start()
    shop.work_until(lambda: len(shop.rows()["shipped"]) >= 1)
    assert shop.rows()["paid"] == [IN_JOB, IN_JOB]


@pytest.mark.parametrize("server_url", ["mariadb"], indirect=True)
def test_under_gevent_a_timeout_rolls_back_and_the_retry_commits(open_shop):
    shop = open_shop()
    shop.producer.enqueue(Message(shop.place.queue, "slow", (20,), {}, {}))
    shop.start("dramatiq-gevent")
    until(lambda: shop.rows()["receipts"] == [20], 60, shop.log.read_text)
    shop.stop()
    assert shop.rows()["paid"] == [20]
    assert "retried: message" in shop.log.read_text()
