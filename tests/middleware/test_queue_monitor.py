"""Warning before a queue is late: thresholds, hysteresis, who is told, gauges, and the thread beside a worker."""

from __future__ import annotations

import dataclasses
import logging
import sys
import threading
import time
from datetime import timedelta

import dramatiq
import pytest
from dramatiq import Message, Worker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.errors import ConnectionClosed

from dramatiq_policies import ConfigurationError, Metrics, QueueAlert, QueueMonitor, Threshold, install
from dramatiq_policies.brokers.readers import QueueReading
from dramatiq_policies.observability.election import Election
from dramatiq_policies.observability.queue_thresholds import ThresholdTracker
from dramatiq_policies.testing import drain, stub

from ..support import PATIENCE, Stage


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Processes of one parent with the same queues elect one of them: this one's lock lies where no other looks."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Queue:
    """A queue on a StubBroker, and a monitor that nobody but the test runs."""

    def __init__(self, threshold=None, **arguments):
        self.told = []
        arguments.setdefault("on_alert", self.told.append)
        thresholds = {} if threshold is None else {"mail": threshold}
        self.monitor = QueueMonitor(thresholds=thresholds, **arguments)
        self.broker = install(StubBroker(), queue_monitor=self.monitor)
        self.broker.declare_queue("mail")

    def fill(self, count):
        queue = self.broker.queues["mail"]
        while queue.qsize() > count:
            queue.get()
        while queue.qsize() < count:
            self.broker.enqueue(Message("mail", "send", (), {}, {}))
        return self

    def check(self, count):
        return [(alert.value, alert.cleared) for alert in self.fill(count).monitor.check()]


def test_a_threshold_that_is_reached_alerts_once():
    queue = Queue(Threshold(ready=10))
    assert [queue.check(count) for count in (9, 10, 11, 50)] == [[], [(10, False)], [], []]
    assert queue.told == [QueueAlert(queue="mail", measure="ready", value=10, threshold=10, cleared=False)]


def test_a_monitor_alerts_again_only_after_the_value_has_come_down_to_four_fifths():
    queue = Queue(Threshold(ready=10))
    assert [len(queue.check(count)) for count in (10, 9, 10, 8, 9, 10)] == [1, 0, 0, 0, 0, 1]


def test_the_end_of_a_breach_is_reported_on_demand():
    queue = Queue(Threshold(ready=10, notify_clear=True))
    assert [queue.check(count) for count in (12, 9, 8, 0)] == [[(12, False)], [], [(8, True)], []]


def test_dead_letters_have_a_threshold_too():
    queue = Queue(Threshold(dead=1))
    assert queue.monitor.check() == []
    queue.broker.dead_letters_by_queue["mail"].append(object())
    assert [(alert.measure, alert.value) for alert in queue.monitor.check()] == [("dead", 1)]


def test_the_age_of_the_oldest_is_in_milliseconds():
    queue = Queue(Threshold(oldest=timedelta(minutes=5)))
    queue.broker.queues["mail"].put(Message("mail", "send", (), {}, {"ready_at": 1_700_000_000_000}).encode())
    (alert,) = queue.monitor.check()
    assert (alert.measure, alert.threshold) == ("oldest", 300_000)
    assert alert.value > 300_000


def test_messages_that_wait_and_are_not_taken_are_stalled():
    queue = Queue(Threshold(stalled=20)).fill(1)
    assert queue.monitor.check() == []
    time.sleep(0.03)
    assert [alert.measure for alert in queue.monitor.check()] == ["stalled"]


def test_the_next_elected_monitor_knows_the_reported_breaches_and_their_ends():
    class Handed(Election):
        memory = None

        def save(self, memory):
            Handed.memory = memory

        def saved(self):
            return Handed.memory

    first, second = Queue(Threshold(ready=10)), Queue(Threshold(ready=10))

    def turn(queue, count):
        queue.fill(count).monitor._monitor_once(Handed())
        return len(queue.told)

    assert turn(first, 10) == 1
    assert turn(second, 10) == 0
    # It is over, of which nobody is told; who takes over after that has to warn again.
    assert turn(first, 0) == 1
    assert turn(Queue(Threshold(ready=10)), 10) == 1


def test_an_unknown_value_reaches_no_threshold():
    watch = ThresholdTracker({"*": Threshold(ready=1, oldest=1, stalled=1, dead=1)})
    assert watch.transitions(QueueReading(queue="mail")) == []


def test_a_queue_s_own_threshold_counts_before_a_pattern_and_patterns_in_their_order():
    watch = ThresholdTracker(
        {"*.slow": Threshold(ready=1_000), "mail.*": Threshold(ready=100), "mail.slow": Threshold(ready=10)}
    )
    assert watch.threshold_of("mail.slow").ready == 10
    assert watch.threshold_of("mail.fast").ready == 100
    assert watch.threshold_of("images.slow").ready == 1_000
    assert watch.threshold_of("images") is None


def test_alerts_and_thresholds_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Threshold(ready=1).ready = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        QueueAlert(queue="mail", measure="ready", value=1, threshold=1).value = 2


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"ready": 0},
        {"ready": True},
        {"ready": 1.5},
        {"dead": -1},
        {"oldest": 0},
        {"oldest": "5m"},
        {"stalled": timedelta(0)},
        {"notify_clear": True},
    ],
)
def test_a_threshold_that_makes_no_sense_is_refused(bad):
    with pytest.raises(ConfigurationError, match="Threshold"):
        Threshold(**bad)


async def coroutine(alert):
    pass


@pytest.mark.parametrize(
    "bad",
    [
        {"interval": 0},
        {"interval": "1s"},
        {"thresholds": [Threshold(ready=1)]},
        {"thresholds": {"mail": 5}},
        {"thresholds": {1: Threshold(ready=1)}},
        {"on_alert": "mail"},
        {"on_alert": [print, 5]},
        {"on_alert": coroutine},
        {"queue_prefix": ""},
        {"in_workers": "no"},
        {"interval": 10**15},
        {"on_alert": lambda: None},
    ],
)
def test_a_monitor_that_makes_no_sense_is_refused(bad):
    with pytest.raises(ConfigurationError, match="QueueMonitor"):
        QueueMonitor(**bad)


def test_a_monitor_on_no_broker_says_so():
    with pytest.raises(ConfigurationError, match="on no broker"):
        QueueMonitor().check()


def test_by_default_an_alert_is_a_warning_with_its_fields(caplog):
    queue = Queue(Threshold(ready=2, notify_clear=True), on_alert=None)
    caplog.set_level(logging.INFO, "dramatiq_policies.alerts")
    queue.check(3)
    queue.check(0)
    breach, clear = [record for record in caplog.records if record.name == "dramatiq_policies.alerts"]
    assert (breach.levelname, clear.levelname) == ("WARNING", "INFO")
    assert (breach.queue, breach.measure, breach.value, breach.threshold, breach.cleared) == (
        "mail",
        "ready",
        3,
        2,
        False,
    )
    assert breach.getMessage() == "Queue mail: 3 messages wait (threshold 2)"


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_all_callbacks_are_notified_although_one_fails(error, caplog):
    def broken(alert):
        raise error("no pager")

    first, second = [], []
    queue = Queue(Threshold(ready=1), on_alert=[first.append, broken, "log", second.append])
    queue.check(1)
    assert len(first) == len(second) == 1
    assert "no pager" in caplog.text
    assert "1 message waits" in caplog.text


def test_the_error_without_sentry_sdk_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentry_sdk", None)
    with pytest.raises(ImportError, match=r'pip install "dramatiq-policies\[sentry\]"'):
        QueueMonitor(on_alert="sentry")


def test_sentry_gets_alerts_on_demand():
    sentry_sdk = pytest.importorskip("sentry_sdk")
    events = []

    class Transport(sentry_sdk.transport.Transport):
        def capture_envelope(self, envelope):
            events.extend(item.get_event() for item in envelope.items if item.type == "event")

    sentry_sdk.init(dsn="http://key@localhost/1", transport=Transport, default_integrations=False)
    try:
        queue = Queue(Threshold(ready=1), on_alert="sentry")
        queue.check(1)
    finally:
        sentry_sdk.init()
    (event,) = events
    assert event["level"] == "error"
    assert event["fingerprint"] == ["dramatiq_policies", "queue", "mail", "ready"]
    assert event["tags"] == {"queue": "mail", "measure": "ready"}


class Client:
    """A statsd client that keeps what it is given."""

    def __init__(self):
        self.gauges = {}

    def incr(self, name, count=1):
        raise AssertionError(name)

    def timing(self, name, value):
        raise AssertionError(name)

    def gauge(self, name, value):
        self.gauges[name] = value


class TaggingClient:
    def __init__(self):
        self.gauges = {}

    def increment(self, name, value=1, tags=None):
        raise AssertionError(name)

    timing = increment

    def gauge(self, name, value, tags=None):
        self.gauges[(name, *tags)] = value


def test_beside_a_worker_it_sends_the_gauges_of_every_queue_and_of_the_workers():
    client, release = Client(), threading.Event()
    monitor = QueueMonitor(interval=10, client=client)
    stage = Stage(bundle={"queue_monitor": monitor})

    @stage.actor(queue_name="mail")
    def send():
        assert release.wait(PATIENCE)

    stage.broker.declare_queue("other.urgent")
    for _ in range(20):
        send.send()
    send.send_with_options(delay=60_000)
    with stage.working(threads=2):
        until(lambda: client.gauges.get("workers.busy") == 2)
        until(lambda: client.gauges.get("queues.mail.delayed") == 1)
        release.set()
        until(lambda: client.gauges["workers.busy"] == 0)
    assert client.gauges["workers.threads"] == 2
    names = {"ready", "delayed", "dead", "oldest_ms"}
    expected = {f"queues.{queue}.{name}" for queue in ("mail", "other.urgent") for name in names}
    assert client.gauges.keys() == expected | {"workers.busy", "workers.threads"}


def test_a_dogstatsd_client_gets_the_queue_as_a_tag():
    client = TaggingClient()
    stage = Stage(bundle={"queue_monitor": QueueMonitor(interval=10, client=client, queue_prefix="q")})
    stage.broker.declare_queue("mail")
    with stage.working():
        until(lambda: ("q.oldest_ms", "queue:mail") in client.gauges)
    assert client.gauges["q.ready", "queue:mail"] == 0


def test_without_a_client_of_its_own_it_sends_where_metrics_sends():
    client = Client()
    client.incr = client.timing = lambda name, value=1: None
    bundle = {"metrics": Metrics(client, queue_prefix="q"), "queue_monitor": QueueMonitor(interval=10)}
    stage = Stage(bundle=bundle)
    stage.broker.declare_queue("mail")
    with stage.working():
        until(lambda: client.gauges.get("q.mail.ready") == 0)
        until(lambda: "workers.threads" in client.gauges)


def test_a_reading_on_request_sends_the_gauges_too():
    client = Client()
    client.incr = client.timing = lambda name, value=1: None
    monitor = QueueMonitor()
    stage = Stage(bundle={"metrics": Metrics(client), "queue_monitor": monitor})
    stage.broker.declare_queue("mail")
    monitor.check()
    assert {"queues.mail.ready", "queues.mail.delayed", "queues.mail.dead", "queues.mail.oldest_ms"} == set(
        client.gauges
    )


def monitoring():
    return [thread for thread in threading.enumerate() if thread.name == "dramatiq-policies-queue-monitor"]


def test_a_monitor_runs_beside_a_worker_ends_with_it_and_runs_beside_the_next():
    told = []
    stage = Stage(
        bundle={"queue_monitor": QueueMonitor(interval=5, thresholds={"*": Threshold(dead=1)}, on_alert=told.append)}
    )

    @stage.actor(queue_name="mail", max_retries=0)
    def send():
        raise ValueError

    assert monitoring() == []
    send.send()
    with stage.working():
        until(lambda: told)
        assert len(monitoring()) == 1
        stage.drain()
    assert monitoring() == []
    with stage.working():
        assert len(monitoring()) == 1
    assert monitoring() == []


def test_a_monitor_outside_of_workers_starts_no_thread():
    stage = Stage(bundle={"queue_monitor": QueueMonitor(interval=5, in_workers=False)})
    with stage.working():
        assert monitoring() == []


def test_a_broker_that_can_t_be_read_is_logged_once_and_read_again_when_it_can(caplog):
    caplog.set_level(logging.INFO, "dramatiq_policies.alerts")
    queue = Queue(Threshold(ready=1), interval=5)
    reader = queue.monitor._get_reader()
    read_all, calls = reader.read_all, []

    def away():
        calls.append(None)
        # Long enough that the process leaves a turn to others.
        if len(calls) <= 7:
            raise ConnectionError("refused")
        return read_all()

    reader.read_all = away
    queue.fill(1)
    stop = threading.Event()
    thread = threading.Thread(target=queue.monitor.run_forever, args=(stop,))
    thread.start()
    until(lambda: queue.told)
    stop.set()
    thread.join()
    said = [record.getMessage() for record in caplog.records if "read" in record.getMessage()]
    assert len(said) == 2
    assert "refused" in said[0]
    assert said[1] == "The queues can be read again."


def test_added_by_itself_it_finds_its_place():
    monitor = QueueMonitor(thresholds={"default": Threshold(ready=1)}, on_alert=[])
    broker = StubBroker()
    broker.add_middleware(monitor)

    @dramatiq.actor(broker=broker)
    def job():
        pass

    job.send()
    assert [alert.measure for alert in monitor.check()] == ["ready"]


def test_while_the_app_is_on_a_stub_broker_it_reads_that():
    told = []
    monitor = QueueMonitor(thresholds={"*": Threshold(ready=2)}, on_alert=told.append)
    broker = install(RedisBroker(url="redis://127.0.0.1:1"), queue_monitor=monitor)

    @dramatiq.actor(broker=broker)
    def job():
        pass

    for _ in range(2):
        with stub(broker) as stand_in:
            in_stub = next(one for one in stand_in.middleware if isinstance(one, QueueMonitor))
            for _ in range(3):
                job.send()
            assert [alert.value for alert in in_stub.check()] == [3]
            assert [alert.value for alert in monitor.check()] == [3]
            assert drain(stand_in).outcomes(job) == ["succeeded"] * 3
    assert len(told) == 4
    with pytest.raises(ConnectionClosed):
        monitor.check()


def test_a_single_thread_monitors_for_all_workers_of_a_process():
    queue = Queue(Threshold(ready=3), interval=10)
    workers = [Worker(queue.broker, worker_timeout=50, worker_threads=1, queues={"none"}) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        threads = [one for one in threading.enumerate() if one.name == "dramatiq-policies-queue-monitor"]
        assert len(threads) == 1
        until(lambda: queue.monitor._watching)
        workers.pop().stop()
        assert threads[0].is_alive()
        queue.fill(3)
        until(lambda: queue.told or queue.monitor.check())
        assert len(queue.told) == 1
    finally:
        for worker in workers:
            worker.stop()
    assert not threads[0].is_alive()
