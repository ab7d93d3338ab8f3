"""A job runs once, also when its message arrives twice."""

from __future__ import annotations

import asyncio
import functools
import threading
import time

import dramatiq
import pytest
import redis.asyncio
from dramatiq import pipeline
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import AsyncIO
from dramatiq.results import ResultFailure, Results
from dramatiq.results.backends import StubBackend

from dramatiq_policies import (
    ConfigurationError,
    Discard,
    Idempotency,
    RetryPolicy,
    Snooze,
    constant,
    current_job,
    exponential,
    install,
)
from dramatiq_policies.common import clock
from dramatiq_policies.delivery.broker_state import state_of
from dramatiq_policies.idempotency import claims
from dramatiq_policies.idempotency.options import register_name
from dramatiq_policies.idempotency.records import RUNNING, Record, completed_by
from dramatiq_policies.stores.memory import MemoryStore
from dramatiq_policies.stores.redis import RedisStore
from dramatiq_policies.testing import drain

from ..support import Stage


class Transient(Exception):
    pass


class Permanent(Exception):
    pass


def keep(stage, **options):
    """An actor with a key that writes down each run."""
    runs = []

    @stage.actor(idempotency_key="order:{order_id}", **options)
    def ship(order_id, note=None):
        runs.append((order_id, current_job().attempt))

    ship.runs = runs
    return ship


# Duplicates.


def test_a_duplicate_of_a_completed_job_is_skipped():
    stage = Stage()
    ship = keep(stage)
    ship.send(7)
    ship.send(7, note="again")
    ship.send(8)
    stage.run()
    assert sorted(ship.runs) == [(7, 1), (8, 1)]
    assert stage.outcomes() == ["succeeded", "duplicate", "succeeded"]
    assert stage.reasons() == [None, "completed", None]


def test_two_actors_never_share_a_key():
    stage = Stage()
    runs = []
    for name in ("ship", "bill"):
        stage.actor(lambda order_id, name=name: runs.append(name), actor_name=name, idempotency_key="{order_id}").send(
            7
        )
    stage.run()
    assert sorted(runs) == ["bill", "ship"]


def test_idempotent_guards_a_message_against_itself_and_not_against_another():
    stage = Stage()
    runs = []
    job = stage.actor(lambda: runs.append(1), actor_name="job", idempotent=True)
    message = job.send()
    stage.broker.enqueue(message)
    job.send()
    stage.run()
    assert len(runs) == 2
    assert stage.outcomes() == ["succeeded", "duplicate", "succeeded"]


def test_a_duplicate_of_a_running_job_is_requeued_and_uses_no_attempt():
    stage = Stage()
    entered, go_on = threading.Event(), threading.Event()
    runs = []

    @stage.actor(idempotency_key="{order_id}")
    def ship(order_id):
        runs.append(current_job().attempt)
        entered.set()
        assert go_on.wait(10)

    with stage.working(threads=2):
        ship.send(7)
        assert entered.wait(10)
        ship.send(7)
        stage.collected.wait_for(lambda events: len(events) == 1)
        go_on.set()
        stage.drain()
    assert runs == [1]
    assert stage.outcomes() == ["deferred", "succeeded", "duplicate"]
    assert stage.events[0].reason == "running"
    assert stage.events[0].delay_ms == 1_000
    assert stage.events[2].attempt == 1


def test_a_deferral_waits_at_most_a_quarter_of_the_lease():
    stage = Stage(bundle={"idempotency": Idempotency(MemoryStore(), lease=800)})
    go_on = threading.Event()

    @stage.actor(idempotency_key="{order_id}")
    def ship(order_id):
        assert go_on.wait(10)

    with stage.working(threads=2):
        ship.send(7)
        ship.send(7)
        stage.collected.wait_for(lambda events: len(events) >= 3)
        go_on.set()
        stage.drain()
    waits = [event.delay_ms for event in stage.events if event.outcome == "deferred"]
    assert set(waits) == {200}


def test_each_deferral_waits_twice_as_long_and_the_last_for_the_rest_of_the_lease():
    store = MemoryStore()
    stage = Stage(bundle={"idempotency": Idempotency(store, lease=60_000)})
    ship = keep(stage)
    theirs = Record(RUNNING, "another", owner="elsewhere:1:place:1", retention=1_000).encode()
    store.put(register_name("ship", "order:7"), theirs, 40_000 + 1_000)  # Nobody renews it.
    ship.send(7)
    drain(stage.broker)
    *waits, last = [event.delay_ms for event in stage.events if event.outcome == "deferred"]
    assert waits[:5] == [1_000, 2_000, 4_000, 8_000, 15_000]
    assert last <= 10_000
    assert ship.runs == [(7, 1)]


def test_a_messages_own_key_overrides_the_actors():
    stage = Stage()
    runs = []

    @stage.actor(idempotency_key="{order_id}")
    def ship(order_id):
        runs.append(current_job().idempotency_key)

    ship.send_with_options(args=(1,), idempotency_key="evt_123")
    ship.send_with_options(args=(2,), idempotency_key="evt_123")
    stage.run()
    assert runs == ["evt_123"]


def test_a_message_may_bring_a_key_to_an_actor_that_has_none():
    stage = Stage()
    runs = []
    job = stage.actor(lambda: runs.append(1), actor_name="job")
    for _ in range(3):
        job.send_with_options(idempotency_key="evt_123")
    stage.run()
    assert runs == [1]


def test_a_key_that_is_no_key_fails_the_job_as_its_own_error_would():
    stage = Stage()
    runs = []
    job = stage.actor(lambda: runs.append(1), actor_name="job", max_retries=0)
    job.send_with_options(idempotency_key=["evt"])
    stage.run()
    assert runs == []
    assert stage.outcomes() == ["dead"]
    assert "idempotency_key" in stage.failures()[0]["message"]


# Failures.


def test_a_failed_job_holds_its_key_for_its_own_retry():
    stage = Stage()
    runs = []

    @stage.actor(idempotency_key="{order_id}", retry_on={Transient: RetryPolicy(attempts=3, wait=constant(300))})
    def ship(order_id):
        runs.append((current_job().message_id, current_job().attempt))
        if current_job().attempt == 1:
            raise Transient

    with stage.working():
        first = ship.send(7)
        stage.collected.wait_for(lambda events: len(events) == 1)
        assert Idempotency.state(ship, 7).state == "waiting"
        ship.send(7)
        stage.drain()
    assert runs == [(first.message_id, 1), (first.message_id, 2)]
    assert stage.outcomes() == ["retried", "deferred", "succeeded", "duplicate"]


def test_a_job_that_ends_badly_frees_its_key():
    stage = Stage()
    runs = []

    @stage.actor(idempotency_key="{order_id}", discard_on=Permanent)
    def ship(order_id, fail):
        runs.append(fail)
        if fail:
            raise Permanent

    ship.send(7, fail=True)
    ship.send(7, fail=False)
    stage.run()
    assert runs == [True, False]
    assert stage.outcomes() == ["discarded", "succeeded"]


def test_an_old_copy_of_a_run_that_has_ended_never_runs_again():
    stage = Stage()
    runs = []

    @stage.actor(idempotency_key="{order_id}", discard_on=Permanent)
    def ship(order_id):
        runs.append(1)
        raise Permanent

    message = ship.send(7)
    stage.broker.enqueue(message)
    stage.run()
    assert runs == [1]
    assert stage.outcomes() == ["discarded", "duplicate"]
    assert stage.reasons()[1] == "stale"


def test_an_old_copy_is_stale_also_while_the_retry_waits_and_after_it():
    stage = Stage()
    runs = []

    @stage.actor(idempotency_key="{order_id}", retry_on={Transient: RetryPolicy(attempts=2, wait=constant(200))})
    def ship(order_id):
        runs.append(current_job().attempt)
        raise Transient

    with stage.working():
        message = ship.send(7)
        stage.collected.wait_for(lambda events: len(events) == 1)
        stage.broker.enqueue(message)
        stage.drain()
        stage.broker.enqueue(message)
        stage.drain()
    assert runs == [1, 2]
    assert stage.reasons() == [None, "stale", "exhausted", "stale"]


@pytest.mark.parametrize("with_failure", [True, False], ids=["by hand", "by the command"])
def test_a_replayed_dead_letter_runs_again(with_failure):
    stage = Stage()
    runs = []

    @stage.actor(idempotency_key="{order_id}", max_retries=0)
    def ship(order_id):
        runs.append(1)
        raise Transient

    ship.send(7)
    for _ in range(3):
        stage.run()
        letter = stage.dead[-1]
        again = letter.copy()
        if not with_failure:
            del again.options["failure"]
            again.options["policies"] = {"replays": again.options.get("policies", {}).get("replays", 0) + 1}
        stage.broker.enqueue(again)
    stage.run()
    assert len(runs) == 4
    assert set(stage.outcomes()) == {"dead"}


def test_a_job_that_snoozes_runs_again_under_its_key():
    stage = Stage()
    runs = []

    @stage.actor(idempotency_key="{order_id}")
    def ship(order_id):
        runs.append(current_job().attempt)
        if len(runs) < 3:
            raise Snooze(50)

    message = ship.send(7)
    with stage.working():
        stage.collected.wait_for(lambda events: len(events) == 1)
        stage.broker.enqueue(message)
        stage.drain()
    assert runs == [1, 1, 1]
    assert sorted(stage.outcomes()) == ["deferred", "deferred", "duplicate", "succeeded"]


def test_a_discard_by_the_job_itself_frees_the_key():
    stage = Stage()

    @stage.actor(idempotency_key="{order_id}")
    def ship(order_id):
        raise Discard("already refunded")

    ship.send(7)
    ship.send(7)
    stage.run()
    assert stage.outcomes() == ["discarded", "discarded"]


# done_when.


def test_done_when_says_that_there_is_nothing_left_to_do():
    stage = Stage()
    shipped, runs = set(), []

    @stage.actor(done_when=lambda order_id: "shipped" if order_id in shipped else None)
    def ship(order_id):
        runs.append(order_id)
        shipped.add(order_id)

    ship.send(7)
    ship.send(7)
    stage.run()
    assert runs == [7]
    assert stage.reasons() == [None, "done"]
    assert stage.events[1].duration_ms is None


def test_done_when_completes_the_key():
    stage = Stage()

    @stage.actor(idempotency_key="{order_id}", done_when=lambda order_id: True)
    def ship(order_id):
        raise AssertionError

    ship.send(7)
    ship.send(7)
    stage.run()
    assert stage.reasons() == ["done", "completed"]


def test_done_when_leaves_the_result_of_an_earlier_run_alone():
    backend = StubBackend()
    stage = Stage(middleware=[Results(backend=backend)])
    ship = stage.actor(lambda order_id: "new", actor_name="ship", done_when=lambda order_id: True, store_results=True)
    message = ship.message(7)
    backend.store_result(message, "first", 60_000)
    stage.broker.enqueue(message)
    assert stage.run().reasons() == ["done"]
    assert message.get_result(backend=backend) == "first"


@pytest.mark.parametrize(("days", "remembered"), [([3, 2], 3), ([0, 0], 1)])
@pytest.mark.parametrize("attempts", [2, 3])
def test_a_key_is_remembered_for_as_long_as_the_longest_wait_between_two_runs(days, remembered, attempts):
    day = 86_400_000
    waits = [RetryPolicy(attempts=attempts, wait=number * day) for number in days]
    stage = Stage()
    rules = dict(zip([KeyError, OSError], waits, strict=True))
    stage.actor(lambda order_id: None, actor_name="ship", idempotency_key="{order_id}", retry_on=rules).send(7)
    stage.run()
    assert stage.classifier.attached_to.policies["ship"].idempotency.ttl == remembered * day


@pytest.mark.parametrize(("attempts", "remembered"), [(1, 1), (2, 2), (3, 4), (10_000, 5)])
def test_the_wait_before_the_last_attempt_counts_where_waits_grow(attempts, remembered):
    day = 86_400_000
    policy = RetryPolicy(attempts=attempts, wait=exponential(initial=2 * day, factor=2, maximum=5 * day, jitter=0))
    stage = Stage()
    stage.actor(lambda order_id: None, actor_name="ship", idempotency_key="{order_id}", retry_on={OSError: policy})
    assert stage.classifier.attached_to.policies["ship"].idempotency.ttl == remembered * day


@pytest.mark.parametrize("option", ["done_when", "idempotency_key"])
def test_an_error_of_done_when_or_of_the_key_is_the_jobs_own(option):
    stage = Stage()

    def broken(order_id):
        raise Permanent(order_id)

    stage.actor(lambda order_id: None, actor_name="ship", discard_on=Permanent, **{option: broken}).send(7)
    stage.run()
    assert stage.outcomes() == ["discarded"]


def test_a_callable_makes_the_key():
    stage = Stage()
    runs = []
    key = lambda order, *, kind="a": f"{order['id']}:{kind}"  # noqa: E731
    job = stage.actor(lambda order, kind="a": runs.append(order), actor_name="ship", idempotency_key=key)
    job.send({"id": 1})
    job.send({"id": 1, "note": "x"})
    job.send({"id": 1}, kind="b")
    stage.run()
    assert len(runs) == 2


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
    assert str(refused.value).endswith("The callable takes (order_id, email); give it the actor's parameters")


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


# Results and composition.


def with_results():
    backend = StubBackend()
    return Stage(middleware=[Results(backend=backend)]), backend


def test_a_result_that_is_stored_is_not_warned_of(caplog):
    stage, backend = with_results()
    message = stage.actor(lambda: 5, actor_name="add", store_results=True).send()
    stage.run()
    assert backend.get_result(message) == 5
    assert "Results middleware" not in caplog.text


def test_a_duplicate_leaves_the_stored_result_alone():
    stage, backend = with_results()

    @stage.actor(idempotency_key="{order_id}", store_results=True)
    def ship(order_id):
        return f"shipped {order_id}"

    message = ship.send(7)
    stage.broker.enqueue(message)
    other = ship.send(7)
    stage.run()
    assert stage.outcomes() == ["succeeded", "duplicate", "duplicate"]
    assert backend.get_result(message) == "shipped 7"
    assert backend.get_result(other) == "shipped 7"


def test_the_result_of_a_duplicate_whose_first_result_expired_says_so():
    results = StubBackend()
    stage = Stage(middleware=[Results(backend=results)])
    ship = keep(stage, store_results=True, result_ttl=1)
    with stage.working():
        ship.send(1)
        stage.drain()
        time.sleep(0.01)
        duplicate = ship.send_with_options(args=(1,), result_ttl=60_000)
        stage.drain()
    assert stage.reasons() == [None, "completed"]
    with pytest.raises(ResultFailure) as told:
        duplicate.get_result(backend=results)
    assert told.value.orig_exc_msg.startswith("duplicate")


def test_a_job_that_done_when_answers_for_has_the_result_none_and_keeps_one_that_it_has():
    results = StubBackend()
    stage = Stage(middleware=[Results(backend=results)])
    done = []
    ship = stage.actor(
        lambda order_id: "shipped", actor_name="ship", store_results=True, done_when=lambda order_id: order_id in done
    )
    with stage.working():
        ran = ship.send(1)
        stage.drain()
        done += [1, 2]
        stage.broker.enqueue(ran)
        never_ran = ship.send(2)
        stage.drain()
    assert stage.reasons() == [None, "done", "done"]
    assert ran.get_result(backend=results) == "shipped"
    assert never_ran.get_result(backend=results) is None


def test_a_duplicate_moves_its_own_pipeline_on_with_the_first_message_s_result():
    stage, _ = with_results()
    told = []

    @stage.actor(idempotency_key="{order_id}", store_results=True)
    def ship(order_id):
        return f"shipped {order_id}"

    tell = stage.actor(lambda who, what: told.append((who, what)), actor_name="tell")
    pipeline([ship.message(7), tell.message("ann")], broker=stage.broker).run()
    pipeline([ship.message(7), tell.message("bob")], broker=stage.broker).run()
    stage.run()
    assert sorted(told) == [("ann", "shipped 7"), ("bob", "shipped 7")]


def test_a_duplicate_whose_next_step_needs_a_result_that_was_not_stored_is_dead():
    stage = Stage()
    told = []
    ship = keep(stage)
    tell = stage.actor(lambda *args: told.append(args), actor_name="tell")
    pipeline([ship.message(7), tell.message("ann")], broker=stage.broker).run()
    pipeline([ship.message(7), tell.message("bob")], broker=stage.broker).run()
    pipeline([ship.message(7), tell.message_with_options(args=("eve",), pipe_ignore=True)], broker=stage.broker).run()
    stage.run()
    assert sorted(told) == [("ann", None), ("eve",)]
    assert [event.reason for event in stage.events if event.outcome == "dead"] == ["no_result"]


def test_a_result_is_stored_again_until_the_backend_takes_it_before_the_key_is_completed(monkeypatch):
    class Restarting(StubBackend):
        failures = 3

        def _store(self, message_key, result, ttl):
            if self.failures:
                self.failures -= 1
                raise ConnectionError("no backend")
            super()._store(message_key, result, ttl)

    pauses = []
    monkeypatch.setattr(clock, "sleep", pauses.append)
    backend = Restarting()
    stage = Stage(middleware=[Results(backend=backend)])

    @stage.actor(idempotency_key="{order_id}", store_results=True)
    def ship(order_id):
        return f"shipped {order_id}"

    message = ship.send(7)
    stage.run()
    assert stage.outcomes() == ["succeeded"]
    assert backend.get_result(message) == "shipped 7"
    assert len(pauses) == 3


def test_a_backend_that_takes_no_result_holds_a_job_up_for_some_seconds_only(monkeypatch, caplog):
    class Gone(StubBackend):
        def _store(self, message_key, result, ttl):
            raise ConnectionError("no backend")

    pauses = []
    monkeypatch.setattr(clock, "sleep", pauses.append)
    stage = Stage(middleware=[Results(backend=Gone())])
    stage.actor(lambda: 1, actor_name="guarded", idempotent=True, store_results=True).send()
    stage.actor(lambda: 1, actor_name="unguarded", store_results=True).send()
    stage.actor(lambda: {1, 2}, actor_name="unstorable", idempotent=True, store_results=True).send()
    stage.run()
    assert stage.outcomes() == ["succeeded"] * 3
    assert 3 <= sum(pauses) <= 6


def test_the_redelivery_of_a_completed_message_settles_nothing_again():
    stage, _ = with_results()
    told = []

    @stage.actor(idempotency_key="{order_id}", store_results=True)
    def ship(order_id):
        return order_id

    tell = stage.actor(lambda what: told.append(what), actor_name="tell")  # noqa: PLW0108
    pipe = pipeline([ship.message(7), tell.message()], broker=stage.broker).run()
    stage.broker.enqueue(pipe.messages[0])
    stage.run()
    assert told == [7]
    assert stage.outcomes("ship") == ["succeeded", "duplicate"]


# Looking and forgetting.


def test_state_and_forget():
    stage = Stage()
    entered, go_on = threading.Event(), threading.Event()

    @stage.actor(idempotency_key="{order_id}")
    def ship(order_id):
        entered.set()
        assert go_on.wait(10)

    assert Idempotency.state(ship, 7).state == "none"
    with stage.working():
        message = ship.send(7)
        assert entered.wait(10)
        running = Idempotency.state(ship, order_id=7)
        assert (running.state, running.message_id, running.key) == ("running", message.message_id, "7")
        assert abs(running.since - time.time() * 1_000) < 10_000
        assert running.owner
        assert 50_000 < running.left_ms <= 60_000  # the lease
        go_on.set()
        stage.drain()
    assert Idempotency.state(ship, 7).state == "completed"
    assert 86_390_000 < Idempotency.state(ship, 7).left_ms <= 86_400_000  # the ttl
    assert Idempotency.state(ship, 7).message_id == message.message_id
    assert Idempotency.forget(ship, 7)
    assert not Idempotency.forget(ship, 7)
    assert Idempotency.state(ship, 7).state == "none"
    ship.send(7)
    stage.run()
    assert stage.outcomes() == ["succeeded", "succeeded"]


def test_a_key_that_an_async_actors_coroutine_makes_is_known_outside_a_worker_too():
    async def of_order(order_id):
        return f"order:{order_id}"

    class OfOrder:
        async def __call__(self, order_id):
            return f"order:{order_id}"

    async def look(actor):
        return Idempotency.state(actor, 7)

    for make in (of_order, OfOrder()):
        stage = Stage(middleware=[AsyncIO()])

        @stage.actor(idempotency_key=make)
        async def ship(order_id):
            pass

        ship.send(7)
        stage.run()
        assert stage.outcomes() == ["succeeded"]
        assert Idempotency.state(ship, 7).state == "completed"
        assert asyncio.run(look(ship)).key == "order:7"
        assert Idempotency.forget(ship, order_id=7)


def test_the_state_of_an_actor_without_a_key_is_refused():
    stage = Stage()
    job = stage.actor(lambda: None, actor_name="job")
    with pytest.raises(ConfigurationError, match="no idempotency key"):
        Idempotency.state(job)


def test_the_state_is_asked_of_a_message_of_the_global_broker_too(monkeypatch):
    stage = Stage()
    monkeypatch.setattr(dramatiq.broker, "global_broker", stage.broker)

    @stage.actor(idempotency_key=lambda order_id: f"order:{order_id}")
    def ship(order_id):
        pass

    message = ship.send(7)
    stage.run()
    state = Idempotency.state(message)
    assert (state.state, state.key, state.message_id) == ("completed", "order:7", message.message_id)


@pytest.mark.parametrize("arguments", [(), (7,), ("a", "b")])
def test_the_message_id_is_required_for_an_actor_that_is_idempotent_by_it(arguments):
    stage = Stage()
    job = stage.actor(lambda: None, actor_name="job", idempotent=True)
    with pytest.raises(ConfigurationError, match="pass the id, or the message"):
        Idempotency.state(job, *arguments)


def test_a_wait_that_is_over_holds_no_key():
    stage, now = Stage(bundle={"idempotency": Idempotency(MemoryStore(clock=lambda: now[0]))}), [0.0]

    @stage.actor(idempotency_key="{order_id}", retry_on={Transient: RetryPolicy(attempts=2, wait=constant(60_000))})
    def ship(order_id):
        raise Transient

    with stage.working():
        ship.send(7)
        stage.collected.wait_for(lambda events: events)
    waiting = Idempotency.state(ship, 7)
    assert waiting.state == "waiting"
    now[0] += waiting.left_ms / 1_000 + 1
    assert Idempotency.state(ship, 7).state == "none"


def test_the_state_of_a_job_that_is_idempotent_by_message_id_is_asked_by_that_id():
    stage = Stage()
    job = stage.actor(lambda: None, actor_name="job", idempotent=True)
    message, other = job.send(), job.message()
    stage.run()
    assert Idempotency.state(job, message.message_id).state == "completed"
    assert Idempotency.state(job, message.message_id).key == message.message_id
    assert Idempotency.state(job, other.message_id).state == "none"


def test_the_state_is_not_to_be_had_where_there_is_no_idempotency():
    unguarded = Stage(bundle={"idempotency": False})
    without_store = Stage(broker=RabbitmqBroker(url="amqp://nowhere.invalid"), bundle={"idempotency": Idempotency()})
    elsewhere = StubBroker()
    for actor in (
        unguarded.actor(lambda order_id: None, actor_name="ship"),
        without_store.actor(lambda order_id: None, actor_name="ship"),
        dramatiq.actor(lambda order_id: None, actor_name="ship", broker=elsewhere),
    ):
        with pytest.raises(ConfigurationError, match="actor 'ship': the broker has no Idempotency with a store"):
            Idempotency.state(actor, 7)


# What it keeps its keys in, and what it is told when a worker starts.


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
    twin = given.for_stub()
    assert (type(twin.store), twin.claims) == (MemoryStore, None)
    assert (twin.lease, twin.ttl, twin.max_crashes, twin.on_store_error) == (7_000, 8_000, None, "retry")
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


# The store is down.


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


def test_a_claim_whose_answer_came_when_its_lease_was_over_is_asked_for_again(monkeypatch):
    late = 0.0
    monotonic = clock.monotonic
    monkeypatch.setattr(clock, "monotonic", lambda: monotonic() + late)

    class Late(MemoryStore):
        def swap(self, key, expected, value, ttl):
            nonlocal late
            found = super().swap(key, expected, value, ttl)
            if not late:
                late = 3.0
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


def test_a_claim_whose_answer_came_late_and_that_is_ours_still_runs(monkeypatch):
    late = 0.0
    monotonic = clock.monotonic
    monkeypatch.setattr(clock, "monotonic", lambda: monotonic() + late)

    class Late(MemoryStore):
        def swap(self, key, expected, value, ttl):
            nonlocal late
            late = late or 3.0
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
