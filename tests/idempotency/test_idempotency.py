"""A job runs once, also when its message arrives twice."""

from __future__ import annotations

import threading

import pytest
from dramatiq import Message
from dramatiq.results import Results
from dramatiq.results.backends import StubBackend

from dramatiq_policies import (
    Discard,
    Idempotency,
    RetryPolicy,
    Snooze,
    Timeout,
    constant,
    current_job,
    exponential,
)
from dramatiq_policies.idempotency.options import register_of
from dramatiq_policies.idempotency.records import RUNNING, Record
from dramatiq_policies.stores.memory import MemoryStore
from dramatiq_policies.testing import drain

from ..support import Stage
from .jobs import Permanent, Transient, keep

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
    store.put(register_of("ship", "order:7").name, theirs, 40_000 + 1_000)  # Nobody renews it.
    ship.send(7)
    drain(stage.broker)
    *waits, last = [event.delay_ms for event in stage.events if event.outcome == "deferred"]
    assert waits[:5] == [1_000, 2_000, 4_000, 8_000, 15_000]
    assert last <= 10_000
    assert ship.runs == [(7, 1)]


def test_a_retry_waits_while_a_copy_of_its_earlier_run_is_running():
    store = MemoryStore()
    stage = Stage(bundle={"idempotency": Idempotency(store, lease=60_000)})
    ship = keep(stage)
    retry = ship.send_with_options(args=(7,), retries=1)
    copy = Record(RUNNING, retry.message_id, owner="elsewhere:1:place:1", retention=1_000).encode()
    store.put(register_of("ship", "order:7").name, copy, 40_000 + 1_000)
    drain(stage.broker)
    assert [event.outcome for event in stage.events if event.outcome != "deferred"] == ["succeeded"]
    assert sum(event.delay_ms for event in stage.events if event.outcome == "deferred") > 30_000
    assert len(ship.runs) == 1


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


def test_a_redelivery_of_a_completed_job_is_a_duplicate_however_long_it_waited():
    def pay(number):
        runs.append(number)

    runs = []
    stage = Stage(bundle={"idempotency": Idempotency(), "timeout": Timeout(queue_default=60_000)})
    actor = stage.actor(pay, idempotent=True)
    message = actor.send(1)
    stage.run()
    late = {"redelivered": True, "ready_at": message.options["ready_at"] - 120_000}
    for message_id in (message.message_id, "not completed"):
        stage.broker.queues["default"].put(Message("default", "pay", (2,), {}, late, message_id=message_id).encode())
    stage.run()
    assert (runs, stage.outcomes()) == ([1], ["succeeded", "duplicate", "expired"])
