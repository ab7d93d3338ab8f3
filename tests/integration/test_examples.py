"""The FastAPI example with transactions, on a real database."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import dramatiq
import dramatiq.broker
import pytest
import sqlalchemy as sa

from .databases import ASYNC, own_database, with_driver


@pytest.fixture
def shop(server_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The example on a database of its own and a StubBroker."""
    with own_database(server_url) as url:
        monkeypatch.setattr(dramatiq.broker, "global_broker", None)
        monkeypatch.setenv("BROKER_URL", "stub://")
        monkeypatch.setenv("DATABASE_URL", with_driver(url, ASYNC))
        module = importlib.import_module("examples.fastapi_transactions")
        module.url = with_driver(url)  # type: ignore[attr-defined]
        yield module
        sys.modules.pop(module.__name__)
        module.outbox.database.close()
        module.broker.middleware.clear()


def work(broker: Any) -> None:
    worker = dramatiq.Worker(broker, worker_timeout=10, worker_threads=2)
    worker.start()
    try:
        for queue in ("payments", "mail"):
            broker.join(queue, fail_fast=False, timeout=10_000)
    finally:
        worker.stop()


def test_orders_are_paid_once_and_a_rollback_leaves_nothing(shop: Any) -> None:
    testclient = pytest.importorskip("fastapi.testclient")
    with testclient.TestClient(shop.app) as client:
        first = client.post("/orders", params={"email": "ada@example.com", "total": 12}).json()["order"]
        assert client.post("/orders", params={"email": "bob@example.com", "total": 0}).status_code == 422
    # Connections belong to an event loop: the application has closed its own, and the worker makes others.
    shop.charge.send(first)
    shop.broker.emit_after("process_boot")
    work(shop.broker)
    engine = sa.create_engine(shop.url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        assert connection.execute(sa.select(shop.Payment.order_id)).scalars().all() == [first]
        assert connection.execute(sa.select(shop.Order.id)).scalars().all() == [first]
    assert shop.receipts == [(first, "ada@example.com")]
