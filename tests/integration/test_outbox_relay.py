"""A relay publishes the rows left by others: once, unless a process dies or stands still in the wrong moment."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import dramatiq
import pika
import pytest
import sqlalchemy as sa

from dramatiq_policies.transactions.outbox_rows import Selection
from dramatiq_policies.transactions.relay import Relay
from tests.proxy import Proxy

from .databases import with_driver
from .places import RabbitmqPlace, RedisPlace, until
from .shops import Shop

pytestmark = pytest.mark.usefixtures("quick_restarts")

#: The lease in these tests, in milliseconds. A dead process's rows are sent within the lease and 5 s.
LEASE = 1_500

APP = """\
import os, signal, sys, threading
import dramatiq
import sqlalchemy as sa
from sqlalchemy.orm import Session
from dramatiq.brokers.{kind} import {broker_class}
from dramatiq_policies import install
from dramatiq_policies.sql import SqlOutbox
from dramatiq_policies.transactions.outbox import Outbox
from dramatiq_policies.transactions.outbox_table import OutboxTable
from dramatiq_policies.transactions.publication import Publication

engine = sa.create_engine({database!r})
broker = {broker_class}(url={url!r}, **{arguments!r})
outbox = SqlOutbox(engine, lease={lease}, wait=20_000, namespace={namespace!r})
install(broker, outbox=outbox)

@dramatiq.actor(broker=broker, queue_name={queue!r})
def confirm(number):
    pass

def die(*args, **kwargs):
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)

def order(*numbers):
    with Session(engine) as session, session.begin(), outbox.within(session):
        for number in numbers:
            print(confirm.send(number).message_id)
"""


def start(shop, code):
    """Run code in a process with the same outbox."""
    place = shop.place
    on_redis = isinstance(place, RedisPlace)
    app = APP.format(
        kind=place.kind,
        broker_class="RedisBroker" if on_redis else "RabbitmqBroker",
        database=with_driver(
            shop.engine.url.render_as_string(hide_password=False).replace("+" + shop.engine.driver, "")
        ),
        url=place.url,
        arguments={"namespace": place.namespace} if on_redis else {},
        queue=place.queue,
        lease=shop.outbox.lease,
        namespace=shop.outbox.namespace,
    )
    return subprocess.Popen(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", app + textwrap.dedent(code)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )


def run(shop, code, expected=0):
    process = start(shop, code)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == expected, out
    return out.split()


KILLED = -9


@pytest.fixture
def shop(place, database_engine):
    return Shop(place, database_engine, lease=LEASE)


@pytest.fixture
def redis_shop(redis_place, database_engine):
    return Shop(redis_place, database_engine, lease=LEASE)


@pytest.fixture
def later_shop(place, database_engine):
    """Its rows are the relay's."""
    return Shop(place, database_engine, lease=30_000, wait=0)


def test_a_process_that_is_killed_between_commit_and_publication_loses_nothing(shop):
    ids = run(shop, "Outbox.after_commit = die\norder(1, 2)", KILLED)
    assert shop.place.ready() == 0
    began = time.monotonic()
    with shop.relaying():
        until(lambda: shop.pending() == 0, 25)
    assert time.monotonic() - began < LEASE / 1_000 + 5 + 5  # for a busy machine
    found = shop.messages()
    assert sorted(message.message_id for message in found) == sorted(ids)


def test_a_process_that_is_killed_before_its_commit_sends_nothing(shop):
    run(shop, "sa.event.listen(engine, 'commit', die)\norder(1)", KILLED)
    with shop.relaying():
        time.sleep(LEASE / 1_000 + 1)
    assert shop.messages() == []


def test_a_process_that_is_killed_between_publication_and_deletion_sends_twice_with_one_id(shop):
    (message_id,) = run(shop, "OutboxTable.delete = die\norder(1)", KILLED)
    with shop.relaying():
        until(lambda: shop.pending() == 0, 25)
    found = [message.message_id for message in shop.messages()]
    # Redis still has the first one, and takes it for the same.
    assert found == [message_id] * (1 if isinstance(shop.place, RedisPlace) else 2)


def test_a_process_that_stood_still_for_longer_than_its_lease_leaves_its_rows_to_the_relay(shop):
    code = """
        after_commit = Outbox.after_commit
        def freeze(*args, **kwargs):
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGSTOP)
            return after_commit(*args, **kwargs)
        Outbox.after_commit = freeze
        order(1, 2)
    """
    process = start(shop, code)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    with shop.relaying():
        until(lambda: shop.pending() == 0, 25)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert shop.left() == [1, 2]


def test_the_rows_of_a_relay_that_is_killed_are_sent_by_another(shop):
    shop.outbox.wait = 0
    with shop.order():
        for number in range(10):
            shop.confirm.send(number)
    run(shop, "Publication.publish = die\noutbox.run_relay(threading.Event())", KILLED)
    assert {row.is_leased for row in shop.rows()} == {True}
    with shop.relaying():
        until(lambda: shop.pending() == 0, 25)
    assert shop.left() == list(range(10))


def test_relays_share_the_rows_without_a_double(later_shop):
    shop = later_shop
    with shop.order():
        for number in range(1_000):
            shop.confirm.send(number)
    with shop.relaying(2):
        other = start(shop, "outbox.relay_once()\nwhile outbox.relay_once(): pass\n")
        until(lambda: shop.pending() == 0, 60)
        assert other.wait(60) == 0
        other.stdout.close()
    assert shop.left() == list(range(1_000))


def test_a_row_of_a_long_transaction_is_seen_after_later_ones(shop):
    with shop.relaying(2):
        with shop.order():
            shop.confirm.send("long")
            if shop.engine.dialect.name != "sqlite":  # which has one writer
                with shop.order():
                    shop.confirm.send("short")
                until(lambda: shop.place.ready() == 1)
            # The lease of the row ends before its transaction.
            time.sleep(LEASE / 1_000 + 0.5)
        until(lambda: shop.pending() == 0)
        time.sleep(0.5)
    assert shop.left() == (["long"] if shop.engine.dialect.name == "sqlite" else ["long", "short"])


#: As each driver sends it.
COMMIT = {"postgresql": b"COMMIT", "mariadb": b"\x03COMMIT"}


def test_a_commit_whose_answer_is_lost_is_sent_by_the_relay(place, server_url):
    with Proxy.before(server_url) as proxy:
        engine = sa.create_engine(with_driver(proxy.url))
        shop = Shop(place, engine, lease=LEASE)
        lost = proxy.cut_when(COMMIT[sa.make_url(server_url).drivername], after=True)
        with pytest.raises(sa.exc.DBAPIError), shop.order():
            shop.confirm.send(1)
        assert lost.wait()
        assert shop.pending() == 1
        with shop.relaying():
            until(lambda: shop.pending() == 0, 25)
        assert shop.left() == [1]
        shop.outbox.database.close()
        engine.dispose()


def refuse(shop, queue):
    """Have the broker refuse what is sent to a queue."""
    place = shop.place
    if isinstance(place, RedisPlace):
        place.client.set(place.key(queue), "of another type")
    else:
        place.channel.queue_declare(queue, durable=False, auto_delete=True)


@pytest.fixture
def poison(shop, request):
    """An actor whose queue takes nothing."""
    queue = f"{shop.place.queue}-poison"
    poison = dramatiq.actor(print, broker=shop.broker, actor_name="poison", queue_name=queue)
    refuse(shop, queue)
    yield poison
    if isinstance(shop.place, RabbitmqPlace):
        for name in (queue, f"{queue}.DQ", f"{queue}.XQ"):
            with pika.BlockingConnection(pika.URLParameters(shop.place.url)) as connection:
                connection.channel().queue_delete(name)


def test_a_row_that_the_broker_refuses_stops_no_other(shop, poison):
    with shop.order():
        shop.confirm.send(1)
        poison.send(2)
        shop.confirm.send(3)
    (row,) = shop.rows()
    assert (row.actor, row.failures, row.is_leased) == ("poison", 1, False)
    assert re.search("WRONGTYPE|PRECONDITION_FAILED", row.error)
    assert 0 < row.due_in_ms <= 1_000
    shop.outbox.database.run(shop.outbox.rows.retry)
    with shop.order():
        shop.confirm.send(4)
    shop.outbox.relay_once()
    (row,) = shop.rows()
    assert row.failures == 2
    assert shop.left() == [1, 3, 4]


def test_a_row_that_is_no_message_stops_no_other(shop):
    message = shop.confirm.message(2).asdict()
    wrong = [{"options": None}, {"queue_name": 5}, {"queue_name": "mail\ud800"}, {"message_id": None}, {"more": 1}]
    bodies = [*({**message, **fields} for fields in wrong), None, []]
    for body in bodies:
        shop.insert(json.dumps(body).encode())
    shop.insert(shop.confirm.message(3).encode(), kind="later version")
    shop.insert(shop.confirm.message(1).encode())
    shop.outbox.relay_once()
    assert [row.failures for row in shop.rows()] == [1] * (len(bodies) + 1)
    assert shop.left() == [1]


def test_a_row_written_for_another_broker_is_published(shop):
    # Redis alone has an id of its own in each message.
    message = shop.confirm.message(1)
    shop.insert(message.encode())
    shop.insert(message.encode())
    shop.outbox.relay_once()
    assert shop.rows() == []
    assert shop.left() == [1, 1]


def test_ten_failures_are_one_critical_line(shop, poison, caplog):
    with shop.order():
        poison.send(2)
    for _ in range(12):
        shop.outbox.database.run(shop.outbox.rows.retry)
        assert shop.outbox.relay_once() == 1
    (row,) = shop.rows()
    assert row.failures == 13
    assert 50_000 < row.due_in_ms <= 60_000
    (line,) = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert line.name == "dramatiq_policies.alerts"
    assert "'poison'" in line.getMessage()


def test_a_publish_that_redis_refuses_halfway_leaves_one_body(redis_shop, caplog):
    shop, place = redis_shop, redis_shop.place
    place.client.set(place.key(place.queue), "of another type")
    with shop.order():
        shop.confirm.send(1)
    for _ in range(3):
        shop.outbox.database.run(shop.outbox.rows.retry)
        shop.outbox.relay_once()
    bodies = place.key(f"{place.queue}.msgs")
    assert place.client.hlen(bodies) <= 1
    place.client.delete(place.key(place.queue))
    shop.outbox.database.run(shop.outbox.rows.retry)
    shop.outbox.relay_once()
    assert place.client.hlen(bodies) == 1
    assert shop.left() == [1]


def test_a_missing_table_is_logged_once(place, tmp_path, caplog):
    engine = sa.create_engine(f"sqlite:///{tmp_path}/empty.db")
    shop = Shop(place, engine)
    relay = Relay(shop.outbox.database, shop.outbox.publication, shop.outbox.how_to_create)
    pauses = [relay._step() for _ in range(5)]
    assert pauses[0] < pauses[-1] <= 5
    (line,) = [record for record in caplog.records if "table" in record.getMessage()]
    assert "create_tables(engine)" in line.getMessage()
    engine.dispose()


def test_children_of_a_preloading_server_send_over_connections_of_their_own(shop):
    code = """
        order(0)
        def child(start):
            pid = os.fork()
            if pid == 0:
                for number in range(start, start + 10):
                    order(number)
                sys.stdout.flush()
                os._exit(0)
            return pid
        children = [child(start) for start in (10, 20, 30)]
        order(1)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        order(2)
        sys.exit(any(codes))
    """
    run(shop, code)
    assert shop.pending() == 0
    assert shop.left() == [0, 1, 2, *range(10, 40)]


def test_a_relay_ends_at_once_when_stopped(shop):
    stop = threading.Event()
    thread = threading.Thread(target=shop.outbox.run_relay, args=(stop,))
    thread.start()
    time.sleep(0.2)
    stop.set()
    thread.join(5)
    assert not thread.is_alive()


def test_a_namespace_has_rows_of_its_own(place, database_engine):
    one = Shop(place, database_engine, wait=0)
    other = Shop(place, database_engine, wait=0, namespace="other" + place.queue[-12:])
    with one.order():
        one.confirm.send(1)
    assert other.outbox.relay_once() == 0
    assert (one.pending(), other.pending()) == (1, 0)
    assert one.outbox.relay_once() == 1
    assert place.ready() == 1


def test_an_operator_lists_retries_and_purges(later_shop):
    shop = later_shop
    rows, run_ = shop.outbox.rows, shop.outbox.database.run
    with shop.order():
        ids = [shop.confirm.send(number).message_id for number in range(3)]
    assert [(row.message_id, row.actor, row.queue) for row in shop.rows()] == [
        (message_id, "confirm", shop.place.queue) for message_id in ids
    ]
    assert run_(lambda connection: rows.purge(connection, Selection(message_ids=ids[:1]))) == 1
    assert run_(lambda connection: rows.purge(connection, Selection(actor="nobody"))) == 0
    assert run_(lambda connection: rows.retry(connection, Selection(queue=shop.place.queue))) == 2
    stats = run_(rows.stats)
    assert (stats.pending, stats.failing) == (2, 0)
    assert 0 <= stats.oldest_ms < 60_000


def test_a_batch_whose_connection_was_lost_is_not_taken_for_the_batch_before(
    rabbitmq_place: RabbitmqPlace, database_engine: sa.Engine
) -> None:
    with Proxy.before(rabbitmq_place.url) as proxy:
        shop = Shop(rabbitmq_place, database_engine, proxy.url)
        with shop.order():
            shop.confirm.send(1)
        until(lambda: rabbitmq_place.ready() == 1)
        proxy.cut()
        with shop.order():
            shop.confirm.send(2)
        # On another connection, or by a relay.
        with shop.relaying():
            until(lambda: rabbitmq_place.ready() == 2)
    assert [message.args for message in rabbitmq_place.left()] == [(1,), (2,)]
