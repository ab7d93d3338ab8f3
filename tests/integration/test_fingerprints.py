"""A duplicate with other arguments is logged by another process too, and 0.1.0 reads the record of the key."""

from __future__ import annotations

import uuid

import pytest

from dramatiq_policies import Idempotency
from dramatiq_policies.idempotency.records import completed_by
from dramatiq_policies.stores.redis import RedisStore

from .places import Place, RedisPlace, until


def app_of(place: Place, redis_url: str, namespace: str, *, beside: bool):
    """An application as a process of its own has it."""
    store = None if beside else RedisStore.from_url(redis_url, namespace=f"{namespace}:keys")
    app = place.app(idempotency=Idempotency(store))

    @app.actor(idempotency_key="charge:{order}", actor_name="charge")
    def charge(order: int, amount: int) -> None:
        pass

    return app, charge


@pytest.mark.parametrize("used", [True, False], ids=["0.1.0 used the store", "a new store"])
@pytest.mark.parametrize("beside", [True, False], ids=["store beside the broker", "store elsewhere"])
def test_another_process_logs_other_arguments(
    place: Place,
    redis_url: str,
    redis_namespace: str,
    redis_client,
    caplog: pytest.LogCaptureFixture,
    beside: bool,
    used: bool,
) -> None:
    beside = beside and isinstance(place, RedisPlace)
    if used:
        store = RedisStore(redis_client, namespace=f"{redis_namespace}:idem" if beside else f"{redis_namespace}:keys")
        store.put("charge\0charge:7", completed_by(str(uuid.uuid4())), 60_000)
    first, charge = app_of(place, redis_url, redis_namespace, beside=beside)
    with first.working(threads=1):
        for order in range(5):
            charge.send(order, 10)
        until(lambda: first.outcomes.count("succeeded") == 5)
    second, charge = app_of(place, redis_url, redis_namespace, beside=beside)
    with second.working(threads=1):
        charge.send(1, 10)
        charge.send(2, 99)
        until(lambda: second.outcomes.count("duplicate") == 2)
    lines = [record.getMessage() for record in caplog.records if "but other arguments" in record.getMessage()]
    assert len(lines) == 1
    names = list(redis_client.scan_iter(match=f"{redis_namespace}:*", count=5_000))
    values = {name: redis_client.get(name) for name in names if redis_client.type(name) == b"string"}
    sizes = sorted(len(value) for value in values.values() if value[:2] == b"\x01C")
    if used:
        assert sizes == [18] * 6 + [22] * 5
        assert all(0 < redis_client.pttl(name) <= 3_600_000 for name, value in values.items() if len(value) == 22)
    else:
        assert sizes == [22] * 5
