"""No message, whatever it holds, ends a thread or goes without an outcome."""

from __future__ import annotations

import itertools

import pytest
from dramatiq.errors import Retry
from dramatiq.middleware import (
    GroupCallbacks,
)
from dramatiq.rate_limits.backends import StubBackend as RateLimiterStubBackend
from dramatiq.results import Results
from dramatiq.results.backends import StubBackend

from dramatiq_policies import (
    RetryPolicy,
    Snooze,
)

from ..support import Stage
from .scenarios import (
    CardDeclined,
    always,
    failing,
    raw,
)

HOSTILE = [None, True, -1, 0, 1, 10**30, 1e308, float("nan"), float("-inf"), "x", "", [], [1], {}, {"a": 1}]


OPTIONS = [
    "throws",
    "retries",
    "max_retries",
    "min_backoff",
    "max_backoff",
    "max_age",
    "time_limit",
    "timeout",
    "queue_timeout",
    "result_ttl",
    "store_results",
    "on_failure",
    "on_success",
    "on_retry_exhausted",
    "notify_shutdown",
    "broker_priority",
    "policies",
    "failure",
    "ready_at",
    "requeue_timestamp",
    "traceback",
    "pipe_ignore",
    "pipe_target",
    "group_completion_uuid",
    "group_completion_callbacks",
    "retry_on",
    "idempotency_key",
    "redis_message_id",
    "delay",
]


@pytest.mark.parametrize("raises", [None, CardDeclined, OSError, Snooze(60_000), Retry()], ids=repr)
def test_no_value_of_a_message_option_ends_a_thread_or_leaves_a_message_without_its_outcome(raises):
    stage = Stage(middleware=[Results(backend=StubBackend()), GroupCallbacks(RateLimiterStubBackend())])

    @stage.actor(retry_on={CardDeclined: 2}, max_age=10**15, store_results=True)
    def pay():
        if raises is not None:
            raise raises

    ids = []
    for number, (option, value) in enumerate(itertools.product(OPTIONS, HOSTILE)):
        ids.append(f"{option}-{value!r}-{number}")
        raw(stage, options={option: value}, message_id=ids[-1])
    with stage.working(threads=4) as worker:
        stage.collected.wait_for(lambda events: {e.message_id for e in events} >= set(ids), "an outcome for each")
        assert all(thread.is_alive() for thread in worker.workers)
    firsts = [event.message_id for event in stage.events if event.message_id in ids]
    assert len(set(firsts)) == len(ids)


def test_dramatiq_itself_warns_of_a_time_that_is_none(caplog):
    stage = Stage()
    failing(stage)
    raw(stage, options={"eta": "soon"})
    stage.run()
    assert "Invalid eta value" in caplog.text


@pytest.mark.parametrize("eta", [v for v in HOSTILE if v not in (10**30, 1e308)], ids=repr)
def test_a_hostile_eta_runs_now(eta):
    stage = Stage()
    failing(stage)
    raw(stage, options={"eta": eta}, message_id="hostile")
    raw(stage, options={"eta": 5}, message_id="due")
    raw(stage, message_id="good")
    stage.run()
    assert sorted(event.message_id for event in stage.events) == ["due", "good", "hostile"]
    assert stage.outcomes() == ["succeeded"] * 3


@pytest.mark.parametrize(
    "policies",
    [
        {"runs": 5},
        {"runs": {f"{CardDeclined.__module__}.CardDeclined": "x"}},
        {"runs": {f"{CardDeclined.__module__}.CardDeclined": [-1, 0]}},
        {"runs": {f"{CardDeclined.__module__}.CardDeclined": [True, None]}},
        {"total": -5, "history": [1, None, {}]},
        {"history": {"a": 1}, "snoozed_since": "yesterday"},
    ],
)
def test_counters_that_can_not_be_read_are_taken_as_absent(policies):
    stage = Stage()
    always(stage, CardDeclined(), retry_on={CardDeclined: RetryPolicy(attempts=2, wait=0)})
    raw(stage, options={"policies": policies})
    assert stage.run().outcomes() == ["retried", "dead"]


BODIES = {
    "no JSON": b"\x80 not json",
    "nothing": b"",
    "null": b"null",
    "a list": b"[1, 2]",
    "a number": b"5",
    "no fields": b"{}",
    "unknown fields": b'{"a": 1}',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_body_that_can_not_be_read_is_dead_lettered_raw_and_the_next_message_runs(body):
    stage = Stage()
    failing(stage)
    stage.broker.queues["default"].put(body)
    raw(stage, message_id="good")
    stage.run()
    malformed, good = sorted(stage.events, key=lambda event: event.outcome)
    assert (malformed.outcome, malformed.reason, malformed.queue) == ("dead", "malformed", "default")
    assert malformed.actor is malformed.message_id is malformed.attempt is malformed.duration_ms is None
    assert (good.outcome, good.message_id) == ("succeeded", "good")
    assert len(stage.dead) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"options": None},
        {"options": []},
        {"message_id": 5},
        {"message_id": None},
        {"kwargs": None},
        {"kwargs": [1]},
        {"args": None},
        {"args": 5},
        {"actor_name": None},
        {"actor_name": ["pay"]},
        {"queue_name": 5},
        {"queue_name": None},
        {"message_timestamp": "now"},
        {"message_timestamp": None},
        {"message_timestamp": float("nan")},
        {"more": 1},
    ],
    ids=repr,
)
def test_a_field_of_the_wrong_type_is_malformed_and_the_next_message_runs(changes):
    stage = Stage()
    failing(stage)
    raw(stage, **changes)
    raw(stage, message_id="good")
    stage.run()
    assert sorted(zip(stage.outcomes(), stage.reasons(), strict=True), key=str) == [
        ("dead", "malformed"),
        ("succeeded", None),
    ]


@pytest.mark.parametrize(
    "target",
    [
        5,
        "x",
        [],
        {"actor_name": "pay"},
        {"queue_name": 1, "actor_name": "pay", "args": [], "kwargs": {}, "options": {}},
        {"queue_name": "default", "actor_name": "pay", "args": 5, "kwargs": {}, "options": {}},
    ],
    ids=repr,
)
def test_a_next_step_that_is_no_message_is_malformed_before_the_job_runs(target):
    stage = Stage()
    ran = []
    stage.actor(lambda: ran.append(1), actor_name="pay")
    raw(stage, options={"pipe_target": target})
    raw(stage, message_id="good")
    stage.run()
    assert sorted(stage.outcomes()) == ["dead", "succeeded"]
    assert "malformed" in stage.reasons()
    assert ran == [1]


def test_a_next_step_for_an_unknown_actor_is_published_and_becomes_a_dead_letter(impatient):
    stage = Stage()
    failing(stage)
    target = {"queue_name": "nowhere", "actor_name": "nobody", "args": [], "kwargs": {}, "options": {}}
    raw(stage, options={"pipe_target": target})
    raw(stage, message_id="good")
    stage.run()
    assert sorted(stage.outcomes()) == ["dead", "succeeded"]


def test_a_message_runs_from_the_queue_of_its_delivery_and_not_from_the_one_in_its_body():
    stage = Stage()
    failing(stage)
    raw(stage, queue="elsewhere")
    (event,) = stage.run().events
    assert (event.outcome, event.queue) == ("succeeded", "default")


def test_a_message_in_flight_from_stock_dramatiq_is_handled():
    stage = Stage()
    always(stage, CardDeclined(), retry_on={CardDeclined: RetryPolicy(attempts=2, wait=0)})
    raw(stage, options={"retries": 3, "traceback": "…", "requeue_timestamp": 5})
    assert stage.run().outcomes() == ["retried", "dead"]
    assert [event.attempt for event in stage.events] == [4, 5]
