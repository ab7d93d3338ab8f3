"""The outbox under a QueueMonitor: its gauges, its threshold, and a database that can't be read."""

from __future__ import annotations

import json
import logging

import dramatiq
import pytest
import sqlalchemy as sa
from dramatiq.brokers.stub import StubBroker
from dramatiq.errors import ConnectionClosed

from dramatiq_policies import ConfigurationError, QueueMonitor, Threshold, install
from dramatiq_policies.brokers.readers import QueueReading
from dramatiq_policies.observability.election import CommandElection
from dramatiq_policies.observability.queue_thresholds import OUTBOX, ThresholdTracker
from dramatiq_policies.sql import SqlOutbox, create_tables
from dramatiq_policies.testing import stub
from dramatiq_policies.transactions.outbox_table import MESSAGE, NewRow


class Client:
    """A plain StatsD client."""

    def __init__(self):
        self.gauges = {}

    def incr(self, name, value=1):
        raise AssertionError(name)

    timing = incr

    def gauge(self, name, value):
        self.gauges[name] = value


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """The lock of the election lies where no other test looks."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


class Shop:
    """A monitor on a broker with an outbox in a file."""

    def __init__(self, folder, **monitor):
        self.engine = sa.create_engine(f"sqlite:///{folder / 'shop.db'}")
        self.outbox = SqlOutbox(self.engine)
        self.client, self.told = Client(), []
        self.monitor = QueueMonitor(on_alert=self.told.append, client=self.client, **monitor)
        self.broker = install(StubBroker(), outbox=self.outbox, queue_monitor=self.monitor)
        self.broker.declare_queue("mail")
        create_tables(self.engine)

    def add(self, count):
        row = NewRow(MESSAGE, "id", "send_mail", "mail", b"body")
        for _ in range(count):
            self.outbox.database.run(lambda connection: self.outbox.table.insert(connection, row, "", due=True))

    def empty(self):
        self.outbox.database.run(self.outbox.rows.purge)


def test_the_gauges_of_the_outbox_are_sent_with_those_of_the_queues(tmp_path):
    shop = Shop(tmp_path)
    shop.monitor.check()
    assert (shop.client.gauges["outbox.pending"], shop.client.gauges["outbox.oldest_ms"]) == (0, 0)
    shop.add(3)
    shop.monitor.check()
    assert shop.client.gauges["outbox.pending"] == 3
    assert 0 <= shop.client.gauges["outbox.oldest_ms"] < 60_000
    assert shop.client.gauges["queues.mail.ready"] == 0
    assert not any("outbox" in name for name in shop.client.gauges if name.startswith("queues"))


def test_a_breach_alerts_once_and_clears(tmp_path):
    shop = Shop(tmp_path, outbox=Threshold(ready=2, notify_clear=True))
    shop.add(2)
    assert [str(alert) for alert in shop.monitor.check()] == ["Outbox: 2 messages wait (threshold 2)"]
    assert shop.monitor.check() == []
    shop.empty()
    shop.monitor.check()
    breach, cleared = shop.told
    assert (breach.queue, breach.measure, breach.value, breach.is_outbox) == ("outbox", "ready", 2, True)
    assert cleared.cleared


def test_the_age_of_its_oldest_message_has_a_threshold(tmp_path):
    shop = Shop(tmp_path, outbox=Threshold(oldest=1))
    shop.add(1)
    alerts = []
    while not alerts:
        alerts = shop.monitor.check()
    assert "Outbox: the oldest message has waited for" in str(alerts[0])


def test_the_thresholds_of_queues_are_not_for_the_outbox(tmp_path):
    shop = Shop(tmp_path, thresholds={"*": Threshold(ready=1), "outbox": Threshold(ready=1)})
    shop.add(5)
    assert shop.monitor.check() == []


def test_a_queue_called_outbox_is_another_one(tmp_path):
    shop = Shop(tmp_path, outbox=Threshold(ready=1), thresholds={"outbox": Threshold(ready=1)})

    @dramatiq.actor(broker=shop.broker, queue_name="outbox")
    def job():
        pass

    job.send()
    shop.add(1)
    first, second = shop.monitor.check()
    assert (first.is_outbox, str(first)) == (False, "Queue outbox: 1 message waits (threshold 1)")
    assert (second.is_outbox, str(second)) == (True, "Outbox: 1 message waits (threshold 1)")
    assert shop.monitor.check() == []


def test_a_database_that_can_t_be_read_is_logged_once_and_the_queues_go_on(tmp_path, caplog):
    caplog.set_level(logging.INFO, "dramatiq_policies.alerts")
    shop = Shop(tmp_path, thresholds={"mail": Threshold(ready=1)})
    with shop.engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE dramatiq_policies_outbox RENAME TO elsewhere"))

    @dramatiq.actor(broker=shop.broker, queue_name="mail")
    def job():
        pass

    job.send()
    assert len(shop.monitor.check()) == 1
    shop.monitor.check()
    assert "outbox.pending" not in shop.client.gauges
    (line,) = [record for record in caplog.records if "The outbox can't be read" in record.getMessage()]
    assert line.levelno == logging.ERROR
    with shop.engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE elsewhere RENAME TO dramatiq_policies_outbox"))
    shop.monitor.check()
    assert "The outbox can be read again." in caplog.text
    assert shop.client.gauges["outbox.pending"] == 0


def test_a_stub_reads_the_rows_of_its_own_namespace(tmp_path):
    shop = Shop(tmp_path, outbox=Threshold(ready=1))
    shop.add(1)
    with stub(shop.broker) as stand_in:
        (monitor,) = [one for one in stand_in.middleware if isinstance(one, QueueMonitor)]
        assert monitor.check() == []


def unreachable(*_):
    raise ConnectionClosed("refused")


def test_while_the_broker_is_unreachable_the_outbox_alerts(tmp_path):
    shop = Shop(tmp_path, outbox=Threshold(ready=2))
    shop.monitor._get_reader().read_all = unreachable
    shop.add(2)
    for _ in range(2):
        with pytest.raises(ConnectionClosed, match="refused"):
            shop.monitor.check()
    assert [alert.value for alert in shop.told] == [2]
    assert shop.client.gauges["outbox.pending"] == 2


def test_leaders_that_cannot_reach_the_broker_take_turns_and_alert_once(tmp_path):
    """Two processes of one command."""
    shops = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        shops.append(Shop(tmp_path / name, outbox=Threshold(ready=2)))
        shops[-1].add(2)
        shops[-1].monitor._get_reader().read_all = unreachable
    elections = [CommandElection("queues", 1, folder=str(tmp_path)) for _ in shops]
    led = set()
    for _ in range(12):
        for shop, election in zip(shops, elections, strict=True):
            shop.monitor._monitor_once(election)
            led |= {shop for shop in shops if shop.monitor._elected}
    assert len(led) == 2
    assert [alert.value for shop in shops for alert in shop.told] == [2]
    for election in elections:
        election.resign()


def test_a_leader_that_comes_back_alerts_for_a_breach_that_ended_under_another_leader(tmp_path):
    shops = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        shops.append(Shop(tmp_path / name, outbox=Threshold(ready=2)))
    first, second = shops
    of_first, of_second = (CommandElection("queues", 1, folder=str(tmp_path)) for _ in shops)
    first.add(2)
    first.monitor._monitor_once(of_first)
    of_first.resign()
    second.monitor._monitor_once(of_second)  # Its outbox is empty: the breach is over.
    first.monitor._elected = False
    of_second.resign()
    first.monitor._monitor_once(of_first)
    of_first.resign()
    assert [alert.value for alert in first.told] == [2, 2]


@pytest.mark.parametrize("wrong", [Threshold(dead=1), Threshold(ready=1, stalled=5_000), {"ready": 1}, 5])
def test_a_threshold_of_anything_else_is_refused(wrong):
    with pytest.raises(ConfigurationError, match=r"QueueMonitor.*outbox.*a Threshold of ready, oldest, or both"):
        QueueMonitor(outbox=wrong)


def test_another_process_goes_on_with_the_open_breach_of_the_outbox():
    """The leader of the fleet saves the open breaches, and its successor does not alert again."""
    tracker = ThresholdTracker({"outbox": Threshold(ready=1)}, Threshold(ready=1))
    reading = QueueReading(queue=OUTBOX, ready=1)
    assert len(tracker.transitions(reading)) == 1
    successor = tracker.reset()
    successor.open = {(queue, measure) for queue, measure in json.loads(json.dumps(sorted(tracker.open)))}
    assert successor.transitions(reading) == []
    assert len(successor.transitions(QueueReading(queue="outbox", ready=1))) == 1
