"""The options of actors and of Idempotency, and the stores that they choose."""

from __future__ import annotations

import functools
import threading

import dramatiq
import pytest
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import AsyncIO

from dramatiq_policies import (
    ConfigurationError,
    Idempotency,
    install,
)
from dramatiq_policies.delivery.broker_state import state_of
from dramatiq_policies.stores.memory import MemoryStore
from dramatiq_policies.stores.redis import RedisStore

from ..support import Stage
from .jobs import keep

# Declarations.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"idempotency_key": "order:{nope}"}, "nope"),
        ({"idempotency_key": "order:{order_id"}, "template"),
        ({"idempotency_key": "order"}, "at least one field"),
        ({"idempotency_key": 7}, "template or a callable"),
        ({"idempotent": "yes"}, "idempotent"),
        ({"idempotent": 1}, "idempotent"),
        ({"idempotent": True, "idempotency_ttl": -1}, "idempotency_ttl"),
        ({"idempotent": True, "idempotency_ttl": 0}, "idempotency_ttl"),
        ({"done_when": True}, "done_when"),
        ({"max_crashes": 0}, "max_crashes"),
        ({"max_crashes": True}, "max_crashes"),
    ],
)
def test_a_bad_option_is_refused_at_declaration(options, said):
    stage = Stage()
    with pytest.raises(ConfigurationError) as refused:
        stage.actor(lambda order_id: None, actor_name="ship", **options)
    assert str(refused.value).startswith(f"actor 'ship': {[*options][-1]}: expected ")
    assert said in str(refused.value)


@pytest.mark.parametrize("option", ["idempotency_key", "done_when"])
def test_a_callable_that_takes_no_call_of_the_actor_s_is_refused_at_declaration(option):
    stage = Stage()

    def of_another(order_id, email):
        pass

    with pytest.raises(ConfigurationError) as refused:
        stage.actor(lambda order_id: None, actor_name="ship", **{option: of_another})
    assert str(refused.value).startswith(
        f"actor 'ship': {option}: expected a callable with the parameters of the actor, (order_id), got <function "
    )
    assert str(refused.value).endswith("The callable takes (order_id, email); give it the actor's parameters.")


@pytest.mark.parametrize("option", ["idempotency_key", "done_when"])
def test_a_call_of_an_async_or_a_class_based_actor_is_checked_too(option):
    stage = Stage(middleware=[AsyncIO()])

    async def ship(order_id):
        pass

    with pytest.raises(ConfigurationError, match="the parameters of the actor"):
        stage.actor(ship, **{option: lambda: "x"})
    meta = type("Meta", (), {"broker": stage.broker, option: staticmethod(lambda: "x")})
    with pytest.raises(ConfigurationError, match=r"the parameters of the actor, \(order_id\)"):
        type("Ship", (dramatiq.GenericActor,), {"Meta": meta, "perform": lambda self, order_id: None})


def test_a_callable_without_a_signature_is_taken():
    stage = Stage()
    stage.actor(lambda order_id: None, actor_name="by_key", idempotency_key=str)
    stage.actor(lambda order_id: None, actor_name="by_state", done_when=min)

    def with_session(fn):
        @functools.wraps(fn)
        def wrapped(*args):
            return fn("session", *args)

        return wrapped

    @stage.actor(idempotency_key=lambda order_id: f"order:{order_id}")
    @with_session
    def decorated(session, order_id):
        pass

    decorated.send(7)
    decorated.send(7)
    stage.run()
    assert stage.outcomes() == ["succeeded", "duplicate"]


def takes_something(a, b):
    pass


takes_something.__signature__ = "nobody knows what", 5


@pytest.mark.parametrize("fn", [min, takes_something])
def test_an_actor_without_a_signature_takes_a_callable_as_key(fn):
    stage = Stage()
    with pytest.raises(ConfigurationError, match=r"^actor 'least': idempotency_key: .*has no readable signature"):
        stage.actor(fn, actor_name="least", idempotency_key="{a}")
    least = stage.actor(fn, actor_name="least", idempotency_key=lambda a, b: f"{a}:{b}", done_when=lambda a, b: False)
    least.send(2, 1)
    stage.run()
    assert stage.outcomes() == ["succeeded"]
    assert Idempotency.state(least, 2, 1).key == "2:1"


def test_a_job_without_arguments_may_have_a_constant_key():
    stage = Stage()
    runs = []
    nightly = stage.actor(lambda: runs.append(1), actor_name="nightly", idempotency_key="nightly")
    nightly.send()
    nightly.send()
    stage.run()
    assert stage.outcomes() == ["succeeded", "duplicate"]
    assert Idempotency.state(nightly).key == "nightly"


def test_idempotency_s_options_are_known_without_any_other_middleware_of_ours():
    broker = StubBroker()
    broker.add_middleware(Idempotency())
    options = {
        "idempotency_key": "{order_id}",
        "idempotency_ttl": 1,
        "max_crashes": 2,
        "done_when": lambda order_id: False,
    }
    ship = dramatiq.actor(lambda order_id: None, actor_name="ship", broker=broker, **options)
    assert Idempotency.state(ship, 7).state == "none"


def test_a_coroutine_function_is_refused_on_an_actor_that_is_not_async():
    async def later(order_id):
        return True

    class Later:
        async def __call__(self, order_id):
            return True

    stage = Stage()
    for option in ("done_when", "idempotency_key"):
        for given in (later, Later()):
            with pytest.raises(ConfigurationError, match=f"{option}: expected a plain function"):
                stage.actor(lambda order_id: None, actor_name="ship", **{option: given})


@pytest.mark.parametrize(
    "options",
    [
        {"idempotent": True},
        {"idempotency_key": "{order_id}"},
        {"done_when": bool},
        {"max_crashes": 2},
        {"max_crashes": 0},
    ],
)
@pytest.mark.parametrize("broker", ["rabbitmq", "switched off"])
def test_an_actor_that_asks_for_it_where_there_is_none_is_refused(broker, options):
    if broker == "rabbitmq":
        broker = install(RabbitmqBroker(url="amqp://nowhere.invalid"))
    else:
        broker = Stage(bundle={"idempotency": False}).broker
    with pytest.raises(ConfigurationError, match="no Idempotency"):
        dramatiq.actor(lambda order_id: None, actor_name="ship", broker=broker, **options)


def test_an_actor_that_asks_for_nothing_is_declared_where_there_is_none():
    stage = Stage(bundle={"idempotency": False})
    nothing = {"idempotent": False, "idempotency_key": None, "done_when": None, "max_crashes": None}
    stage.actor(lambda order_id: None, actor_name="ship", **nothing).send(7)
    stage.run()
    assert stage.outcomes() == ["succeeded"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"store": 7},
        {"lease": 0},
        {"lease": "1s"},
        {"ttl": -1},
        {"on_store_error": "ignore"},
        {"max_crashes": 0},
    ],
)
def test_a_bad_argument_is_refused(arguments):
    with pytest.raises(ConfigurationError, match=f"^Idempotency: {next(iter(arguments))}: expected"):
        Idempotency(**arguments)


# Stores and workers.


def stored_at(broker):
    idempotency = next(one for one in broker.middleware if isinstance(one, Idempotency))
    return idempotency.store


@pytest.mark.parametrize(("namespace", "kept_in"), [("dramatiq", "idem"), ("shop", "shop:idem")])
def test_a_redis_broker_keeps_them_beside_its_messages(namespace, kept_in):
    broker = install(RedisBroker(url="redis://nowhere.invalid:7/3", namespace=namespace))
    dramatiq.actor(lambda order_id: None, actor_name="ship", broker=broker, idempotency_key="{order_id}")
    store = stored_at(broker)
    assert isinstance(store, RedisStore)
    assert store.namespace == kept_in
    assert store.is_beside(broker.client)
    assert store.client.connection_pool is not broker.client.connection_pool


def test_a_stub_broker_keeps_them_in_memory_and_a_rabbitmq_broker_nowhere():
    assert isinstance(stored_at(Stage().broker), MemoryStore)
    broker = install(RabbitmqBroker(url="amqp://nowhere.invalid"), idempotency=Idempotency())
    assert stored_at(broker) is None


def test_a_copy_for_tests_keeps_its_settings_and_has_a_memory_of_its_own():
    given = Idempotency(RedisStore.from_url("redis://nowhere.invalid"), lease=7_000, ttl=8_000, max_crashes=None)
    Stage(bundle={"idempotency": given})
    in_stub = given.for_stub()
    assert (type(in_stub.store), in_stub.claims) == (MemoryStore, None)
    assert (in_stub.lease, in_stub.ttl, in_stub.max_crashes, in_stub.on_store_error) == (7_000, 8_000, None, "retry")
    assert isinstance(given.store, RedisStore)
    assert given.claims is not None


def test_a_worker_starts_though_its_store_can_not_list_its_limits(caplog):
    class Unreachable(MemoryStore):
        def warnings(self):
            raise ConnectionError("no store")

    stage = Stage(bundle={"idempotency": Idempotency(Unreachable())})
    stage.actor(lambda: None, actor_name="job").send()
    stage.run()
    assert stage.outcomes() == ["succeeded"]
    assert [record.name for record in caplog.records if record.levelname == "ERROR"] == ["dramatiq_policies.alerts"]
    assert [record.name for record in caplog.records if record.levelname == "CRITICAL"] == []


def test_the_thread_that_renews_leases_ends_with_its_worker():
    def renewing():
        return [thread for thread in threading.enumerate() if thread.name == "dramatiq-policies-leases"]

    before = renewing()
    stage = Stage()
    ship = keep(stage)
    with stage.working():
        ship.send(7)
        stage.drain()
        assert len(renewing()) == len(before) + 1
    assert renewing() == before


def test_an_actor_that_was_known_before_it_is_guarded_too():
    stage = Stage(bundle={"idempotency": False})
    job = stage.actor(lambda: None, actor_name="job")
    job.send()
    stage.run()
    stage.broker.add_middleware(Idempotency())
    for _ in range(2):
        job.send_with_options(idempotency_key="once")
    stage.run()
    assert stage.outcomes() == ["succeeded", "succeeded", "duplicate"]


def test_a_second_worker_subscribes_to_stuck_jobs_no_second_time():
    stage = Stage()
    for _ in range(2):
        with stage.working():
            pass
    idempotency = next(one for one in stage.broker.middleware if isinstance(one, Idempotency))
    subscribers = state_of(stage.broker).outcomes.stuck_subscribers
    assert subscribers.count(idempotency._uncount_other_jobs) == 1


def test_idempotency_s_durations_have_defaults_and_may_be_a_millisecond():
    assert (Idempotency().lease, Idempotency().ttl, Idempotency().max_crashes) == (60_000, 86_400_000, 3)
    assert (Idempotency(lease=1).lease, Idempotency(ttl=1).ttl) == (1, 1)
    with pytest.raises(ConfigurationError, match="ttl"):
        Idempotency(ttl=0)


def test_a_bad_argument_is_named_with_the_expected_values():
    with pytest.raises(
        ConfigurationError, match='Idempotency: on_store_error: expected "retry" or "run", got \'ignore\''
    ):
        Idempotency(on_store_error="ignore")
