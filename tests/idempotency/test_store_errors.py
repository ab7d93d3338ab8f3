"""Jobs while the store is down or answers late; warnings of a store."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import redis.asyncio

from dramatiq_policies import (
    ConfigurationError,
    Idempotency,
    current_job,
)
from dramatiq_policies.common import clock
from dramatiq_policies.idempotency import claims
from dramatiq_policies.idempotency.records import completed_by
from dramatiq_policies.stores.memory import MemoryStore
from dramatiq_policies.stores.redis import RedisStore

from ..support import Stage
from .jobs import keep


class Flaky(MemoryStore):
    down = False

    def _find(self, key):
        if Flaky.down:
            raise ConnectionError("no store")
        return super()._find(key)

    def _write(self, key, value, ttl):
        if Flaky.down:
            raise ConnectionError("no store")
        super()._write(key, value, ttl)


@pytest.fixture
def flaky():
    yield Flaky()
    Flaky.down = False


def test_while_the_store_is_down_a_message_waits_and_uses_no_attempt(flaky, caplog):
    stage = Stage(bundle={"idempotency": Idempotency(flaky, lease=400)})
    ship = keep(stage)
    Flaky.down = True
    with stage.working():
        for order in range(5):
            ship.send(order)
        stage.collected.wait_for(lambda events: len(events) >= 10)
        assert set(stage.reasons()) == {"store_down"}
        Flaky.down = False
        stage.drain()
    assert sorted(ship.runs) == [(order, 1) for order in range(5)]
    assert [r.message for r in caplog.records if "can't be reached" in r.message and r.levelname == "ERROR"] != []
    assert len([r for r in caplog.records if "can't be reached" in r.message]) == 1
    assert len([r for r in caplog.records if "is back" in r.message]) == 1


def test_a_job_runs_while_the_store_is_down_with_on_store_error_run(flaky, caplog):
    stage = Stage(bundle={"idempotency": Idempotency(flaky, on_store_error="run")})
    ship = keep(stage)
    Flaky.down = True
    ship.send(1)
    stage.run()
    assert stage.outcomes() == ["succeeded"]
    assert any("without a claim" in record.message for record in caplog.records)


def test_an_actor_without_idempotency_runs_while_the_store_is_down(flaky):
    stage = Stage(bundle={"idempotency": Idempotency(flaky)})
    Flaky.down = True
    stage.actor(lambda: None, actor_name="job").send()
    stage.run()
    assert stage.outcomes() == ["succeeded"]


def test_a_completion_is_written_when_the_store_is_back(flaky, monkeypatch):
    monkeypatch.setattr(claims, "_COMPLETION_PAUSES", (0.05, 0.1))
    stage = Stage(bundle={"idempotency": Idempotency(flaky, lease=300)})

    @stage.actor(idempotency_key="{order_id}")
    def ship(order_id):
        Flaky.down = True

    with stage.working():
        ship.send(7)
        stage.collected.wait_for(lambda events: len(events) == 1)
        Flaky.down = False
        deadline = time.monotonic() + 5
        while Idempotency.state(ship, 7).state != "completed":
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def delay(monkeypatch):
    """Set the clock ahead by ``delay.seconds``."""
    delay, monotonic = SimpleNamespace(seconds=0.0), clock.monotonic
    monkeypatch.setattr(clock, "monotonic", lambda: monotonic() + delay.seconds)
    return delay


def test_a_claim_whose_answer_came_when_its_lease_was_over_is_asked_for_again(delay):
    class Late(MemoryStore):
        def swap(self, key, expected, value, ttl):
            found = super().swap(key, expected, value, ttl)
            if not delay.seconds:
                delay.seconds = 3.0
                self.put(key, completed_by("another"), 10_000)
            return found

    stage = Stage(bundle={"idempotency": Idempotency(Late(), lease=2_000)})
    ship = keep(stage)
    ship.send(7)
    stage.run()
    assert ship.runs == []
    assert stage.outcomes() == ["duplicate"]


@pytest.mark.parametrize("by_itself", [True, False])
def test_only_a_claim_that_another_took_is_logged_as_lost(caplog, by_itself):
    store = MemoryStore()
    idempotency = Idempotency(store)
    stage = Stage(bundle={"idempotency": idempotency})

    @stage.actor(idempotency_key="{order_id}")
    def ship(order_id):
        (claim,) = idempotency.claims.leases._held.values()
        store.put(claim.name, completed_by(current_job().message_id if by_itself else "another"), 10_000)
        idempotency.claims.leases.renew()

    ship.send(7)
    stage.run()
    assert ["was lost" in record.message for record in caplog.records].count(True) == (0 if by_itself else 1)


def test_a_claim_whose_answer_came_late_and_that_is_ours_still_runs(delay):
    class Late(MemoryStore):
        def swap(self, key, expected, value, ttl):
            delay.seconds = 3.0
            return super().swap(key, expected, value, ttl)

    stage = Stage(bundle={"idempotency": Idempotency(Late(), lease=2_000)})
    ship = keep(stage)
    ship.send(7)
    stage.run()
    assert ship.runs == [(7, 1)]


def test_a_record_of_an_unknown_version_makes_the_message_wait_and_never_run(caplog):
    store = MemoryStore()
    stage = Stage(bundle={"idempotency": Idempotency(store, lease=200)})
    ship = keep(stage)
    store.put("ship\x007", b"\x63something new", 60_000)
    store.put("ship\x00order:7", b"\x63something new", 500)
    with stage.working():
        ship.send(7)
        stage.collected.wait_for(lambda events: len(events) >= 2)
        assert ship.runs == []
        stage.drain()
    assert ship.runs == [(7, 1)]
    assert stage.reasons() == ["store_down"] * (len(stage.events) - 1) + [None]
    assert any("this version of dramatiq_policies" in record.message for record in caplog.records)


def test_a_memory_store_drops_expired_keys_as_it_grows():
    now = 0.0
    store = MemoryStore(clock=lambda: now)
    for number in range(1_000):
        store.put(f"old {number}", b"x", 1_000)
    now = 2.0
    for number in range(100):
        store.put(f"new {number}", b"x", 1_000)
    assert len(store._entries) < 200
    assert store.get("new 0").value == b"x"


@pytest.mark.parametrize("client", ["redis://127.0.0.1:6379/0", 5, object(), redis.asyncio.Redis()], ids=type)
def test_an_object_that_is_no_client_of_redis_is_refused(client):
    with pytest.raises(ConfigurationError, match="RedisStore: client: expected a client of redis-py"):
        RedisStore(client)
    with pytest.raises(ConfigurationError, match="RedisStore: namespace: expected "):
        RedisStore(namespace=None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"maxmemory": 10, "maxmemory_policy": "allkeys-lru"}, 1),
        ({"maxmemory": 10, "maxmemory_policy": "noeviction"}, 0),
        ({"maxmemory": 0, "maxmemory_policy": "allkeys-lru"}, 0),
        ({}, 0),
    ],
)
def test_a_redis_that_may_evict_keys_is_warned_of(settings, said):
    class Client:
        def info(self, section):
            return settings

        def execute_command(self, *command):
            raise AssertionError

    warnings = RedisStore(Client()).warnings()
    assert len(warnings) == said
    assert all("allkeys-lru" in warning and "noeviction" in warning for warning in warnings)
