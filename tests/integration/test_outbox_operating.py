"""``dramatiq-policies outbox`` on real databases, and its relay as a process that ends cleanly."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import dramatiq
import pytest
import sqlalchemy as sa
from dramatiq.brokers.stub import StubBroker

from dramatiq_policies import Idempotency, install, ops
from dramatiq_policies.sql import SqlOutbox, SqlStore
from dramatiq_policies.transactions.database import KEYS, OUTBOX
from dramatiq_policies.transactions.outbox_table import MESSAGE, NewRow

from .databases import async_engine, with_driver
from .places import RedisPlace, until

APP = """
import dramatiq
from dramatiq.brokers.redis import RedisBroker
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from dramatiq_policies import install
from dramatiq_policies.sql import SqlOutbox

engine = create_engine({url!r})
broker = RedisBroker(url={redis!r}, namespace={namespace!r})
outbox = SqlOutbox(engine, wait=0, relay=False)
install(broker, outbox=outbox)
dramatiq.set_broker(broker)

@dramatiq.actor(queue_name={queue!r}, idempotent=True)
def send_mail(number):
    pass

def feed(count):
    with Session(engine) as session, session.begin(), outbox.within(session):
        for number in range(count):
            send_mail.send(number)
"""


class Shop:
    def __init__(self, engine):
        self.outbox = SqlOutbox(engine)
        self.broker = install(StubBroker(), outbox=self.outbox)
        dramatiq.actor(lambda number: None, actor_name="send_mail", queue_name="mail", broker=self.broker)

    def row(self, message_id, actor="send_mail", owner=""):
        row = NewRow(MESSAGE, message_id, actor, "mail", b"body")
        table = self.outbox.table
        self.outbox.database.run(lambda connection: table.insert(connection, row, owner, due=not owner))


@pytest.fixture(params=["sync", "async"])
def shop(request: pytest.FixtureRequest, database_url: str) -> Shop:
    engine = sa.create_engine(with_driver(database_url)) if request.param == "sync" else async_engine(database_url)
    return Shop(engine)


def test_the_functions_find_retry_and_purge_rows(shop: Shop) -> None:
    for one in ("aa-1", "aa_2", "Aa-3", "b!%"):
        shop.row(one)
    shop.row("taken", "load", owner="a process")
    broker = shop.broker
    stats = ops.read_outbox(broker)
    assert (stats.pending, stats.failing) == (5, 0)
    assert [row.message_id for row in ops.list_outbox(broker, limit=2)] == ["aa-1", "aa_2"]
    assert [tuple(group) for group in ops.count_outbox(broker)] == [("send_mail", "mail", 4), ("load", "mail", 1)]
    assert ops.select_outbox(broker, message_ids=["aa_"]).message_ids == ("aa_2",)
    assert ops.select_outbox(broker, message_ids=["b!"]).message_ids == ("b!%",)
    with pytest.raises(ops.OperationError, match=r"Several messages of the outbox begin with 'aa'"):
        ops.select_outbox(broker, message_ids=["aa"])
    assert ops.retry_outbox(broker) == 4
    assert ops.retry_outbox(broker, ops.select_outbox(broker, actor="load")) == 0
    assert ops.purge_outbox(broker, ops.select_outbox(broker, message_ids=["b!"])) == 1
    assert ops.purge_outbox(broker) == 4
    assert ops.read_outbox(broker).pending == 0


def test_a_missing_table_is_a_sentence_and_a_finding(shop: Shop, database_url: str) -> None:
    engine = sa.create_engine(with_driver(database_url))
    with engine.begin() as connection:
        connection.execute(sa.text(f"DROP TABLE {OUTBOX}"))
    engine.dispose()
    with pytest.raises(
        ops.OperationError, match=r"The outbox has no table: call dramatiq_policies\.sql\.create_tables"
    ):
        ops.list_outbox(shop.broker)
    findings, _ = ops.check_live(shop.broker)
    assert "DP112" in [finding.code for finding in findings]


def test_a_store_without_its_table_is_a_finding(redis_place: RedisPlace, database_engine: sa.Engine) -> None:
    app = redis_place.app(idempotency=Idempotency(SqlStore(database_engine)))
    app.actor(lambda number: None, actor_name="send_mail", idempotency_key="{number}")
    assert "DP112" not in [finding.code for finding in ops.check_live(app.broker)[0]]
    with database_engine.begin() as connection:
        connection.execute(sa.text(f"DROP TABLE {KEYS}"))
    (finding,) = [one for one in ops.check_live(app.broker)[0] if one.code == "DP112"]
    assert finding.message.startswith(f"The database has no table {KEYS}: call dramatiq_policies.sql.create_tables")


@pytest.mark.parametrize(
    ("database_url", "ending"),
    [("postgresql", signal.SIGTERM), ("mariadb", signal.SIGTERM), ("sqlite", signal.SIGINT)],
    indirect=["database_url"],
)
def test_the_relay_is_a_process_that_publishes_and_ends_cleanly(
    redis_place: RedisPlace, database_url: str, tmp_path, ending: signal.Signals
) -> None:
    place = redis_place
    source = APP.format(url=with_driver(database_url), redis=place.url, namespace=place.namespace, queue=place.queue)
    (tmp_path / "relayed_app.py").write_text(source)
    subprocess.run([sys.executable, "-c", "import relayed_app; relayed_app.feed(150)"], cwd=tmp_path, check=True)
    command = [sys.executable, "-m", "dramatiq_policies", "outbox"]
    found = subprocess.run(
        [*command, "list", "relayed_app", "--format", "json"], check=True, cwd=tmp_path, capture_output=True
    )
    assert len(json.loads(found.stdout)) == 100
    assert place.left() == []
    process = subprocess.Popen([*command, "relay", "relayed_app"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: place.ready() == 150)
        process.send_signal(ending)
        _, said = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert "Publishing the messages of the outbox." in said
    assert said.rstrip().endswith("The relay has stopped.")
    assert len({message.message_id for message in place.left()}) == 150
