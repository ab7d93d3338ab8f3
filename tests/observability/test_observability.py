"""The dashboard of examples/observability: its files can be read, and what they name is sent by a real run."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
import yaml
from dramatiq import Message, Worker
from dramatiq.middleware import ShutdownNotifications

from dramatiq_policies import Metrics, QueueMonitor, RetryPolicy, Snooze, Timeout, constant
from dramatiq_policies.common.clock import now_ms
from dramatiq_policies.sql import SqlOutbox, create_tables

from ..exporter import Exporter
from ..support import PATIENCE, Stage

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "observability"
MAPPING = FOLDER / "statsd-mapping.yml"
DASHBOARD = json.loads((FOLDER / "grafana" / "dashboards" / "jobs.json").read_text())
PANELS = DASHBOARD["panels"]
EXPRESSIONS = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
VARIABLES = {variable["name"]: variable["query"]["query"] for variable in DASHBOARD["templating"]["list"]}


STUCK = ("job_runs_total", (("actor", "stuck"), ("what", "stuck")))


def work_until(stage, condition):
    worker = Worker(stage.broker, worker_timeout=20, worker_threads=2)
    worker.start()
    try:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, (stage.outcomes(), stage.reasons())
            time.sleep(0.01)
    finally:
        worker.stop()


@pytest.fixture(scope="module")
def exporter(tmp_path_factory):
    """The exporter after a run in which everything happens that has a name."""
    exporter = Exporter(MAPPING)
    with pytest.MonkeyPatch.context() as patch:
        # Whoever else runs these tests at the same time elects one of its own.
        patch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("lock")))
        patch.setenv("STATSD_HOST", "127.0.0.1")
        patch.setenv("STATSD_PORT", str(exporter.port))
        engine = sa.create_engine(f"sqlite:///{tmp_path_factory.mktemp('shop')}/shop.sqlite3")
        create_tables(engine)
        stage = Stage(
            middleware=[ShutdownNotifications()],
            bundle={
                "outbox": SqlOutbox(engine),
                "metrics": Metrics(),
                "queue_monitor": QueueMonitor(interval=10),
                "timeout": Timeout(grace=20),
            },
        )
        run(stage, exporter)
    engine.dispose()
    exporter.close()
    return exporter


def run(stage, exporter):
    asked = []
    actor = stage.actor

    @actor(queue_name="orders.mail", retry_on={ValueError: RetryPolicy(attempts=3, wait=constant(1))})
    def confirm(number):
        asked.append(number)
        if number == 1 and asked.count(1) == 1:
            raise ValueError
        if number == 2 and asked.count(2) == 1:
            raise Snooze(1)

    @actor(discard_on=KeyError, alert_on=LookupError, max_retries=0)
    def fail(error):
        raise {"key": KeyError, "lookup": LookupError, "value": ValueError}[error]

    @actor(queue_timeout=1_000)
    def late():
        pass

    @actor(max_age=1_000)
    def old():
        pass

    told = threading.Event()

    @actor(timeout=30, max_retries=0)
    def stuck():
        until = time.monotonic() + PATIENCE
        while not told.is_set() and time.monotonic() < until:
            try:
                time.sleep(0.05)
            except BaseException:
                continue
        time.sleep(0.001)

    @actor(timeout=30, max_retries=0)
    def slow():
        for _ in range(1_000):
            time.sleep(0.005)

    @actor(idempotency_key="{number}")
    def once(number):
        pass

    entered = threading.Event()

    @actor(notify_shutdown=True)
    def patient():
        entered.set()
        for _ in range(2_000):
            time.sleep(0.005)

    for number in range(3):
        confirm.send(number)
    for error in ("key", "lookup", "value"):
        fail.send(error)
    queue = stage.broker.queues["default"]
    queue.put(late.message().copy(options={"ready_at": now_ms() - 60_000}).encode())
    queue.put(Message("default", "old", (), {}, {}, message_timestamp=now_ms() - 60_000).encode())
    slow.send()
    stuck.send()
    once.send(7)
    once.send(7)
    wanted = {"succeeded", "retried", "discarded", "alerted", "dead", "expired", "skipped", "deferred", "duplicate"}

    def seen_stuck():
        if STUCK in exporter.series():
            told.set()
        return told.is_set()

    work_until(
        stage,
        lambda: (
            seen_stuck()
            and set(stage.outcomes()) >= wanted
            and stage.outcomes("slow")
            and stage.outcomes("stuck")
            and stage.outcomes("confirm").count("succeeded") == 3
        ),
    )
    patient.send()
    work_until(stage, entered.is_set)


@pytest.mark.untraced
def test_everything_that_is_sent_has_its_place_in_the_mapping(exporter):
    assert exporter.unmapped == set()


@pytest.mark.untraced
def test_every_name_in_the_mapping_is_sent(exporter):
    sent = {
        (name, tuple((label, "x" if label in ("actor", "queue") else value) for label, value in labels))
        for name, labels in exporter.series()
    }
    names = {name for mapping in exporter.mappings for name in mapping.names()}
    assert len(names) > 15
    assert [name for name in sorted(names) if exporter.series_of(name) not in sent] == []


@pytest.mark.untraced
def test_a_name_with_dots_keeps_them_in_its_label(exporter):
    assert ("queues_ready", (("queue", "orders.mail"),)) in exporter.series()


@pytest.mark.untraced
@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS)
def test_every_panel_queries_a_metric_that_is_sent(exporter, title, expression):
    values = {}
    for name, labels in exporter.series():
        for label, value in labels:
            values.setdefault(name, {}).setdefault(label, set()).add(value)
        values.setdefault(name, {})
    metrics = re.findall(r"\b((?:jobs?|queues|workers)_[a-z_]+)", expression)
    assert metrics
    for metric in metrics:
        name = metric.removesuffix("_bucket")
        assert name in values
        assert (name != metric) == (name in {series for series, _ in exporter.timers})
        for label, _, asked in re.findall(r'(\w+)(=~?)"([^"]*)"', expression):
            assert label in values[name]
            if asked.startswith("$"):
                assert asked[1:] in VARIABLES
            else:
                assert set(asked.split("|")) <= values[name][label]
        grouped = re.search(r"by \(([^)]*)\)", expression)
        if grouped is not None:
            assert set(grouped[1].split(", ")) - {"le"} <= set(values[name])


def test_a_label_of_a_legend_is_left_after_grouping():
    for panel in PANELS:
        for target in panel["targets"]:
            grouped = re.search(r"by \(([^)]*)\)", target["expr"])
            left = set() if grouped is None else set(grouped[1].split(", "))
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= left, panel["title"]


def test_the_panels_are_those_that_are_promised():
    assert {panel["title"] for panel in PANELS} >= {
        "Deliveries by outcome",
        "Duration",
        "Wait",
        "Queue depth",
        "Age of the oldest message",
        "Dead letters",
        "Alerts",
    }
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)


@pytest.mark.untraced
def test_the_choices_above_the_panels_are_sent_too(exporter):
    sent = {(name, label) for name, labels in exporter.series() for label, _ in labels}
    for query in VARIABLES.values():
        metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", query).groups()
        assert (metric, label) in sent


def test_everything_is_provisioned_and_finds_each_other():
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    provisioning = FOLDER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "jobs.yml").read_text())["providers"]
    (job,) = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    assert {target["datasource"]["uid"] for panel in PANELS for target in panel["targets"]} == {source["uid"]}
    assert source["url"].removeprefix("http://").partition(":")[0] in compose
    assert job["static_configs"][0]["targets"][0].partition(":")[0] in compose
    mounted = [volume.split(":")[1] for volume in compose["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounted
    assert "/etc/grafana/provisioning" in mounted


def test_every_file_that_compose_mounts_is_there():
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    observing = [service for service in compose.values() if service.get("profiles") == ["observability"]]
    files = [volume.partition(":")[0] for service in observing for volume in service["volumes"]]
    mounted = [name for name in files if name.startswith("./")]
    assert len(mounted) == 4
    assert [name for name in mounted if not (ROOT / name).exists()] == []
