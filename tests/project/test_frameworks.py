"""The examples for web frameworks and schedulers run as they stand."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import dramatiq.broker
import pytest
import sqlalchemy

ROOT = Path(__file__).parents[2]


@pytest.fixture
def load(monkeypatch):
    """Import an example again, on a new StubBroker."""
    loaded = []

    def example(name):
        monkeypatch.setattr(dramatiq.broker, "global_broker", None)
        monkeypatch.setenv("BROKER_URL", "stub://")
        module = importlib.import_module(f"examples.{name}")
        loaded.append(module.__name__)
        return module

    yield example
    for name in loaded:
        sys.modules.pop(name, None)


def work(broker, queue):
    worker = dramatiq.Worker(broker, worker_timeout=10, worker_threads=1)
    worker.start()
    try:
        broker.join(queue, fail_fast=False, timeout=10_000)
    finally:
        worker.stop()


def test_django_s_own_runner_passes_the_tests_of_the_django_example():
    pytest.importorskip("django_dramatiq")
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "examples.django_shop.settings", "PYTHONPATH": str(ROOT)}
    environment["BROKER_URL"] = "stub://"
    command = [sys.executable, "-m", "django", "test", "examples.django_shop"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nOK" in done.stderr


def test_the_django_module_without_django_says_what_to_install():
    code = (
        "import sys; sys.modules['django'] = None\n"
        "try:\n    import dramatiq_policies.contrib.django\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == 'dramatiq_policies.contrib.django needs Django: pip install "Django>=4.2"\n'


def test_fastapi_sends_from_async_code_and_a_worker_runs_the_coroutine(load):
    testclient = pytest.importorskip("fastapi.testclient")
    shop = load("fastapi_shop")
    with testclient.TestClient(shop.app) as client:
        answer = client.post("/orders/7")
        assert answer.status_code == 202
        assert answer.json()["job"]
        shop.broker.emit_after("process_boot")
        work(shop.broker, "mail")
    assert shop.told == [(7, 1)]


def test_fastapi_says_that_it_could_not_pass_an_order_on(load, monkeypatch):
    testclient = pytest.importorskip("fastapi.testclient")
    shop = load("fastapi_shop")

    def refuse(message, *, delay=None):
        raise ConnectionError("refused")

    monkeypatch.setattr(shop.broker, "enqueue", refuse)
    with testclient.TestClient(shop.app) as client:
        assert client.post("/orders/7").status_code == 503


@pytest.fixture
def transactions(load, monkeypatch, tmp_path):
    """Yield the FastAPI example with transactions, on a new database, and a client."""
    testclient = pytest.importorskip("fastapi.testclient")
    pytest.importorskip("aiosqlite")
    monkeypatch.setenv("DATABASE_URL", f"sqlite+aiosqlite:///{tmp_path}/shop.db")
    shop = load("fastapi_transactions")
    with testclient.TestClient(shop.app) as client:
        shop.broker.emit_after("process_boot")
        yield shop, client


def paid(shop, client):
    """Return the order of each payment."""

    async def orders():
        async with shop.AsyncSession(shop.engine) as session:
            return list(await session.scalars(sqlalchemy.select(shop.Payment.order_id)))

    return client.portal.call(orders)


def test_an_order_and_its_message_are_committed_together_and_a_payment_with_its_key_and_its_receipt(transactions):
    shop, client = transactions
    answer = client.post("/orders", params={"email": "ada@example.com", "total": 12})
    assert (answer.status_code, answer.json()) == (202, {"order": 1})
    shop.charge.send(1)  # a second message, outside of a transaction
    work(shop.broker, "payments")
    work(shop.broker, "mail")
    assert paid(shop, client) == [1]
    assert shop.receipts == [(1, "ada@example.com")]


def test_an_order_that_is_rolled_back_leaves_no_message(transactions):
    shop, client = transactions
    assert client.post("/orders", params={"email": "ada@example.com", "total": 0}).status_code == 422
    assert shop.broker.queues["payments"].qsize() == 0
    work(shop.broker, "payments")
    assert paid(shop, client) == []


def test_flask_s_jobs_run_in_the_application_s_context(load):
    pytest.importorskip("flask")
    shop = load("flask_shop")
    assert shop.app.test_client().post("/orders/7").status_code == 202
    work(shop.broker, "mail")
    assert shop.app.extensions["outbox"] == [("shop@example.com", 7)]


def test_a_scheduler_sends_the_report_of_the_day_before_at_three(load):
    pytest.importorskip("apscheduler")
    example = load("scheduled")
    scheduler = example.make_scheduler()
    (job,) = scheduler.get_jobs()
    midnight = datetime(2030, 5, 2, tzinfo=timezone.utc)
    assert job.trigger.get_next_fire_time(None, midnight) == midnight + timedelta(hours=3)

    job.func(midnight + timedelta(hours=3))
    job.func(midnight + timedelta(hours=3))
    work(example.broker, "reports")
    assert example.reports == ["the figures of 2030-05-01"]


def test_a_scheduler_really_fires(load):
    pytest.importorskip("apscheduler")
    from apscheduler.schedulers.background import BackgroundScheduler

    example = load("scheduled")
    scheduler = example.make_scheduler(BackgroundScheduler)
    (job,) = scheduler.get_jobs()
    job.modify(next_run_time=datetime.now(timezone.utc))
    scheduler.start()
    try:
        deadline = datetime.now(timezone.utc) + timedelta(seconds=10)
        while not example.broker.queues["reports"].qsize():
            assert datetime.now(timezone.utc) < deadline
    finally:
        scheduler.shutdown()
    work(example.broker, "reports")
    assert len(example.reports) == 1


def test_periodiq_works_beside_dramatiq_policies(monkeypatch):
    periodiq = pytest.importorskip("periodiq")
    from dramatiq.brokers.stub import StubBroker

    from dramatiq_policies import install

    broker = StubBroker()
    broker.add_middleware(periodiq.PeriodiqMiddleware(skip_delay=30))
    install(broker)
    runs = []

    @dramatiq.actor(broker=broker, periodic=periodiq.cron("0 3 * * *"), retry_on={ConnectionError: 3})
    def nightly():
        runs.append(1)

    nightly.send_with_options(scheduled_at=str(datetime.now(timezone.utc).isoformat()))
    nightly.send_with_options(scheduled_at=str((datetime.now(timezone.utc) - timedelta(hours=1)).isoformat()))
    work(broker, "default")
    assert runs == [1]  # the late one is skipped
