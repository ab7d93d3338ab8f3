"""Two services that share an idempotency store."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker

from dramatiq_policies.idempotency import services
from dramatiq_policies.idempotency.options import register_of
from dramatiq_policies.idempotency.services import neighbours, record_service, server_of, service_scope_of
from dramatiq_policies.stores.memory import MemoryStore
from dramatiq_policies.stores.redis import RedisStore

BILLING = ("rabbitmq / of rabbit@one", None, [("charge", "billing"), ("mail", "billing")])
SHOP = ("rabbitmq / of rabbit@one", None, [("charge", "shop"), ("ship", "shop")])


def rabbitmq(url="amqp://127.0.0.1:1/shop"):
    return RabbitmqBroker(url=url)


def redis_broker(**options):
    return RedisBroker(url="redis://127.0.0.1:1/0", **options)


# The parts of a register's name.


def test_a_namespace_that_was_given_tells_services_apart_by_itself():
    for broker in (rabbitmq(), redis_broker(), StubBroker()):
        assert service_scope_of(broker, RedisStore(namespace="shop")) is None
        assert service_scope_of(broker, RedisStore(namespace="idem")) is None
        assert service_scope_of(broker, RedisStore.from_url("redis://", namespace="shop")) is None


def test_a_default_namespace_leaves_the_distinction_to_the_virtual_host_or_the_brokers_namespace():
    store = RedisStore.from_url("redis://127.0.0.1:1")
    assert store.namespace == "idem"
    assert service_scope_of(rabbitmq(), store) == service_scope_of(
        rabbitmq(["amqp://127.0.0.1:1/shop", "amqp://other/shop"]), store
    )
    places = [
        service_scope_of(broker, store)
        for broker in (rabbitmq(), rabbitmq("amqp://127.0.0.1:1"), redis_broker(), redis_broker(namespace="shop"))
    ]
    assert len(set(places)) == 4
    assert None not in places


def test_a_stub_broker_or_a_foreign_store_adds_nothing_to_the_name():
    assert service_scope_of(StubBroker(), RedisStore()) is None
    assert service_scope_of(rabbitmq(), MemoryStore()) is None


def test_the_names_of_two_services_differ_and_each_knows_where_0_1_0_looked():
    names = [
        register_of("charge", "7", scope)
        for scope in [(), ("a", "q"), ("a", "r"), ("b", "q"), ("a", "q1:x"), ("aq", "")]
    ]
    assert len({name for name, _ in names}) == 6
    assert [earlier for _, earlier in names] == [None, *["charge\0" + "7"] * 5]


# The records of workers at their start.


def test_two_services_that_meet_are_found_by_the_second_and_from_then_on_by_both():
    store = MemoryStore()
    assert record_service(store, *BILLING) == []
    assert neighbours(store, *BILLING) == []
    (found,) = record_service(store, *SHOP)
    assert (found.actor, found.other) == ("charge", "queue 'billing' (rabbitmq / of rabbit@one)")
    (back,) = record_service(store, *BILLING)
    assert (back.actor, back.other) == ("charge", "queue 'shop' (rabbitmq / of rabbit@one)")
    assert neighbours(store, *SHOP) == [found._replace(seen=neighbours(store, *SHOP)[0].seen)]
    assert "'charge'" in str(found)
    assert "RedisStore(…, namespace=…)" in str(found)


def test_two_workers_of_one_service_have_not_met_though_they_run_different_queues():
    store = MemoryStore()
    server, place, queues = SHOP
    for part in (queues, queues[:1], queues[1:], queues):
        assert record_service(store, server, place, part) == []


@pytest.mark.parametrize("server", ["rabbitmq / of rabbit@two", "rabbitmq /b of rabbit@one", "redis dramatiq of 1"])
def test_the_same_queue_of_another_server_is_another_service(server):
    store = MemoryStore()
    record_service(store, *SHOP)
    assert [one.actor for one in record_service(store, server, *SHOP[1:])] == ["charge", "ship"]


def test_services_whose_names_differ_by_their_place_have_not_met():
    store = MemoryStore()
    assert record_service(store, BILLING[0], "rabbitmq /", BILLING[2]) == []
    assert record_service(store, SHOP[0], "rabbitmq /", SHOP[2]) == []
    # But where even the place is the same on two servers, they have.
    assert len(record_service(store, "another", "rabbitmq /", SHOP[2])) == 2


def test_a_queue_that_was_left_a_week_ago_is_no_service(monkeypatch):
    store = MemoryStore()
    record_service(store, *BILLING)
    later = services.now_ms() + 8 * 86_400_000
    monkeypatch.setattr(services, "now_ms", lambda: later)
    assert neighbours(store, *SHOP) == []
    assert record_service(store, *SHOP) == []
    (register,) = store._entries
    assert "billing" not in store.get(register).value.decode()


def test_two_workers_that_start_at_the_same_time_are_both_recorded():
    store = MemoryStore()
    swap, others = store.swap, [BILLING]

    def swap_late(*args):
        if others:
            assert record_service(store, *others.pop()) == []
        return swap(*args)

    store.swap = swap_late
    (found,) = record_service(store, *SHOP)
    assert found.actor == "charge"


@pytest.mark.parametrize("odd", [b"\xff", b"[]", b"7", b'{"charge": 7}', b'{"charge": {"queue": "x"}}'])
def test_a_foreign_record_among_the_services_is_left_out(odd):
    store = MemoryStore()
    store.put(services._SERVICES, odd, 60_000)
    assert record_service(store, *BILLING) == []
    assert len(record_service(store, *SHOP)) == 1


def test_the_register_stays_small_however_many_services_there_were(monkeypatch):
    store, now = MemoryStore(), services.now_ms()
    for number in range(30):
        monkeypatch.setattr(services, "now_ms", lambda at=now + number: at)
        record_service(store, f"server {number}", None, [("charge", "shop")])
    assert len(json.loads(store.get(services._SERVICES).value)["charge"]) <= 11


# The server's name.


def test_a_server_that_can_not_be_asked_has_no_name():
    assert server_of(rabbitmq(), MemoryStore()) is None
    assert server_of(redis_broker(), MemoryStore()) is None
    assert server_of(StubBroker(), MemoryStore()) is None


def test_a_broker_beside_its_store_needs_only_the_namespace_and_asks_no_server():
    broker = redis_broker(namespace="shop")
    assert server_of(broker, RedisStore.beside(broker.client)) == "redis shop"


def test_a_redis_server_keeps_the_name_that_it_was_given():
    kept = {}
    client = SimpleNamespace(set=lambda name, value, nx: kept.setdefault(name, value), get=kept.get)
    broker = redis_broker(namespace="shop")
    broker.client = client
    name = server_of(broker, MemoryStore())
    assert name == server_of(broker, MemoryStore())
    assert list(kept) == ["shop:dramatiq_policies:id"]


def test_a_service_name_needs_no_client_that_is_not_in_use():
    assert "pika" not in vars(sys.modules["dramatiq_policies.idempotency.services"])
