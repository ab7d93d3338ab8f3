"""Whoever waits for a result sees the final one first, however the job ends."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from dramatiq.errors import ConnectionClosed, Retry
from dramatiq.middleware import Middleware, SkipMessage
from dramatiq.results import ResultFailure, Results
from dramatiq.results.backends import StubBackend

from dramatiq_policies import Discard, RetryPolicy, Snooze

from ..idempotency.test_quarantine import Crashing
from ..support import Stage

SOON = RetryPolicy(attempts=2, wait=1)


class Backend(StubBackend):
    """Notes all that anybody could have seen, in order."""

    def __init__(self):
        super().__init__()
        self.results = {}  # Its own: the class has one for all.
        self.stored = []
        self.waiting = threading.Event()

    def _store(self, message_key, result, ttl):
        self.stored.append((message_key, result))
        super()._store(message_key, result, ttl)

    def _get(self, message_key, *args):
        self.waiting.set()
        return super()._get(message_key, *args)


class OwnResults(Results):
    """Somebody's subclass."""


class Skipping(Middleware):
    actor_options = frozenset({"skip_by"})

    def before_process_message(self, broker, message):
        skip_by = message.options.get("skip_by")
        if skip_by == "failing":
            message.fail()
        if skip_by:
            raise SkipMessage("not today")


def stage_with(backend, kind=Results, *, behind=False, **options):
    results = kind(backend=backend, store_results=True)
    stage = Stage(middleware=[Skipping(), *([] if behind else [results])], **options)
    if behind:
        stage.broker.add_middleware(results)
    return stage


def raising(*errors):
    left = list(errors)

    def job(*args):
        if left:
            raise left.pop(0)
        return "done"

    return job


def sent(stage, *errors, options=None, **declared):
    actor = stage.actor(raising(*errors), actor_name="job", **{"min_backoff": 1, "max_backoff": 2, **declared})
    return actor.send_with_options(args=(1,), **(options or {}))


def expired(stage):
    message = stage.actor(raising(), actor_name="job", queue_timeout=60_000).message()
    old = message.copy(options={"ready_at": message.message_timestamp - 3_600_000})
    stage.broker.queues["default"].put(old.encode())
    return message


def a_duplicate(stage):
    sent(stage, idempotency_key=lambda *args: "k")
    return stage.broker.actors["job"].send(1)


def a_composition_that_can_not_be_read(stage):
    return sent(stage, options={"pipe_target": {"no": "message"}})


#: Each way to end: how to get there, the last outcome and reason, and what the waiter gets.
ENDINGS = {
    "succeeded": (sent, "succeeded", None, "done"),
    "succeeded after a retry": (lambda s: sent(s, OSError(), retry_on={OSError: SOON}), "succeeded", None, "done"),
    "succeeded after a stock retry": (lambda s: sent(s, Retry(delay=1)), "succeeded", None, "done"),
    "succeeded after a snooze": (lambda s: sent(s, Snooze(1)), "succeeded", None, "done"),
    "discarded by a rule": (lambda s: sent(s, OSError("x"), discard_on=OSError), "discarded", None, "discarded: x"),
    "discarded by the job": (lambda s: sent(s, Discard("x")), "discarded", None, "discarded: x"),
    "alerted": (lambda s: sent(s, OSError("x"), alert_on=OSError), "alerted", None, "alerted: x"),
    "exhausted": (
        lambda s: sent(s, OSError(), OSError("x"), retry_on={OSError: SOON}),
        "dead",
        "exhausted",
        "dead: x",
    ),
    "exhausted by stock": (lambda s: sent(s, OSError(), OSError("x"), max_retries=1), "dead", "exhausted", "dead: x"),
    "unclassified": (lambda s: sent(s, OSError("x"), max_retries=0), "dead", "unclassified", "x"),
    "thrown": (lambda s: sent(s, OSError("x"), throws=OSError), "dead", "thrown", "x"),
    "expired": (expired, "expired", None, "expired: waited"),
    "too old": (lambda s: sent(s, options={"skip_by": "failing"}), "skipped", None, "unknown|not today"),
    "skipped": (lambda s: sent(s, options={"skip_by": "passing"}), "skipped", None, None),
    "a duplicate": (a_duplicate, "duplicate", "completed", "done"),
    "done": (lambda s: sent(s, done_when=lambda *args: True), "duplicate", "done", None),
    "malformed": (a_composition_that_can_not_be_read, "dead", "malformed", "dead: pipe_target"),
}


def outcome_of(message, backend):
    try:
        return message.get_result(backend=backend, block=True, timeout=20_000)
    except ResultFailure as failure:
        return str(failure)


@pytest.mark.parametrize("kind", [Results, OwnResults])
@pytest.mark.parametrize("behind", [False, True], ids=["before the bundle", "behind the bundle"])
@pytest.mark.parametrize("name", ENDINGS)
def test_a_waiter_that_waits_already_gets_the_final_result_and_nothing_else_is_ever_stored(name, behind, kind):
    go, outcome, reason, expected = ENDINGS[name]
    backend = Backend()
    stage = stage_with(backend, kind, behind=behind)
    message = go(stage)
    key = backend.build_message_key(message)
    with ThreadPoolExecutor(1) as waiter:
        seen = waiter.submit(outcome_of, message, backend)
        assert backend.waiting.wait(20)
        stage.run()
        first = seen.result()
    event = next(event for event in reversed(stage.events) if event.message_id == message.message_id)
    assert (event.outcome.value, event.reason) == (outcome, reason)
    assert len([stored for stored_key, stored in backend.stored if stored_key == key]) == 1
    if isinstance(expected, str):
        assert any(text in first for text in expected.split("|"))
    else:
        assert first is expected
    assert outcome_of(message, backend) == first


@pytest.mark.parametrize("behind", [False, True], ids=["before the bundle", "behind the bundle"])
def test_a_quarantined_message_stores_its_failure_and_nothing_before(behind):
    app, backend = Crashing(), Backend()
    results = Results(backend=backend, store_results=True)
    if behind:
        app.stage.broker.add_middleware(results)
    else:
        app.stage.broker.middleware.insert(0, results)
    message = app.job.message(7)
    app.began(message, 3)
    assert app.comes_back(message) == ("dead", "crashed")
    assert len(backend.stored) == 1
    assert "dead: the job started 3 times" in outcome_of(message, backend)


def test_a_message_whose_turn_has_not_come_stores_nothing():
    backend = Backend()
    stage = stage_with(backend)
    begun, go_on = threading.Event(), threading.Event()

    @stage.actor(idempotency_key=lambda: "k")
    def job():
        begun.set()
        go_on.wait(20)
        return "done"

    first = job.send()
    with stage.working(threads=2):
        assert begun.wait(20)
        second = job.send()
        stage.collected.wait_for(lambda events: any(event.outcome == "deferred" for event in events))
        assert backend.stored == []
        go_on.set()
        assert [outcome_of(message, backend) for message in (first, second)] == ["done", "done"]


def test_a_result_already_read_stays_when_the_next_step_can_not_be_published():
    backend = Backend()
    stage = stage_with(backend)
    job = stage.actor(raising(), actor_name="job", on_success="nobody")
    message = job.send()
    assert stage.run().reasons() == ["handoff_failed"]
    assert outcome_of(message, backend) == "done"
    assert len(backend.stored) == 1


def test_a_failed_message_that_comes_back_stores_nothing_yet():
    backend = Backend()
    stage = stage_with(backend)
    stage.actor(lambda *told: None, actor_name="told", store_results=False)
    message = sent(stage, OSError("x"), on_failure="told", max_retries=0)
    enqueue, refused = stage.broker.enqueue, threading.Semaphore(0)

    def away(message, *, delay=None):
        refused.release()
        raise ConnectionClosed(OSError("gone"))

    stage.broker.enqueue = away
    with stage.working():
        assert refused.acquire(timeout=20)
        assert refused.acquire(timeout=20)
    assert stage.outcomes() == ["interrupted"]
    assert backend.stored == []
    stage.broker.enqueue = enqueue
    stage.run()
    assert outcome_of(message, backend) == "done"
    assert len(backend.stored) == 1
