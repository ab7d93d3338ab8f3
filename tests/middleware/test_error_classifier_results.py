"""Results, pipelines, groups and on_retry_exhausted, by the outcome of their jobs."""

from __future__ import annotations

import pytest
from dramatiq import group, pipeline
from dramatiq.middleware import (
    GroupCallbacks,
    Shutdown,
)
from dramatiq.rate_limits.backends import StubBackend as RateLimiterStubBackend
from dramatiq.results import ResultFailure, Results
from dramatiq.results.backends import StubBackend

from dramatiq_policies import (
    RetryPolicy,
    constant,
)

from ..support import Stage
from .scenarios import (
    SOON,
    CardDeclined,
    PaymentError,
    Refused,
    Refusing,
    always,
    failing,
    outcomes_of,
    raw,
)


@pytest.mark.parametrize(
    ("error", "options", "outcome"),
    [
        (CardDeclined("no"), {"discard_on": CardDeclined}, "discarded"),
        (CardDeclined("no"), {"alert_on": CardDeclined}, "alerted"),
        (CardDeclined("no"), {"retry_on": {CardDeclined: RetryPolicy(attempts=2, wait=0)}}, "dead"),
    ],
)
def test_the_stored_failure_of_a_job_names_its_outcome(error, options, outcome):
    backend = StubBackend()
    stage = Stage(middleware=[Results(backend=backend)])
    message = always(stage, error, store_results=True, **options).send()
    stage.run()
    with pytest.raises(ResultFailure) as raised:
        message.get_result(backend=backend)
    assert raised.value.orig_exc_type == "CardDeclined"
    assert raised.value.orig_exc_msg.startswith(outcome)


@pytest.mark.parametrize("options", [{"max_retries": 0}, {"throws": CardDeclined}])
def test_the_stored_failure_without_a_rule_is_that_of_dramatiq(options):
    backend = StubBackend()
    stage = Stage(middleware=[Results(backend=backend)])
    message = always(stage, CardDeclined("no"), store_results=True, **options).send()
    stage.run()
    with pytest.raises(ResultFailure) as raised:
        message.get_result(backend=backend)
    assert (raised.value.orig_exc_type, raised.value.orig_exc_msg) == ("CardDeclined", "no")


def test_the_stored_failure_of_an_expired_message_says_so():
    backend = StubBackend()
    stage = Stage(middleware=[Results(backend=backend)])
    pay = failing(stage, store_results=True, queue_timeout=60_000)
    message = pay.message()
    raw(stage, message_id=message.message_id)
    stage.run()
    with pytest.raises(ResultFailure) as raised:
        message.get_result(backend=backend)
    assert raised.value.orig_exc_type == "QueueTimeoutExceeded"
    assert raised.value.orig_exc_msg.startswith("expired")


def test_the_result_of_a_success_is_the_jobs_own():
    backend = StubBackend()
    stage = Stage(middleware=[Results(backend=backend)])
    message = failing(stage, PaymentError(), result="paid", store_results=True, retry_on={PaymentError: SOON}).send()
    stage.run()
    assert message.get_result(backend=backend) == "paid"


def test_a_pipeline_goes_on_after_a_success_and_stops_at_a_discard():
    stage = Stage()
    seen = []
    first = stage.actor(lambda x: x + 1, actor_name="first", queue_name="one")
    last = stage.actor(seen.append, actor_name="last", queue_name="two")
    stops = always(stage, CardDeclined(), name="stops", discard_on=CardDeclined)
    pipeline([first.message(1), first.message(), last.message()], broker=stage.broker).run()
    pipeline([stops.message(), last.message()], broker=stage.broker).run()
    stage.run()
    assert seen == [3]
    assert stage.outcomes("stops") == ["discarded"]


def test_a_pipeline_goes_on_after_a_retry():
    stage = Stage()
    seen = []
    last = stage.actor(seen.append, actor_name="last")
    pay = failing(stage, PaymentError(), result="paid", retry_on={PaymentError: SOON})
    pipeline([pay.message(), last.message()], broker=stage.broker).run()
    stage.run()
    assert seen == ["paid"]


def test_a_groups_callback_runs_once_its_members_are_done():
    stage = Stage(middleware=[GroupCallbacks(RateLimiterStubBackend())])
    done = []
    finished = stage.actor(lambda: done.append(1), actor_name="finished")
    pay = failing(stage, PaymentError(), retry_on={PaymentError: SOON})
    members = group([pay.message(), pay.message()], broker=stage.broker)
    members.add_completion_callback(finished.message())
    members.run()
    stage.run()
    assert done == [1]


def test_on_retry_exhausted_is_called_when_a_rule_is_exhausted():
    stage = Stage()
    told = []
    stage.actor(lambda message, info: told.append((message["actor_name"], info)), actor_name="tell")
    always(stage, PaymentError(), retry_on={PaymentError: SOON}, on_retry_exhausted="tell").send()
    stage.run()
    assert told == [("pay", {"retries": 2, "max_retries": 2})]


@pytest.mark.parametrize(
    ("declared", "told"),
    [({"discard_on": PaymentError}, 0), ({"retry_on": {PaymentError: RetryPolicy(attempts=1, then="discard")}}, 1)],
)
def test_on_retry_exhausted_is_called_for_a_discard_that_used_up_its_retries_and_of_no_other(declared, told):
    stage = Stage()
    calls = []
    stage.actor(lambda message, info: calls.append(info), actor_name="tell")
    always(stage, PaymentError(), on_retry_exhausted="tell", **declared).send()
    assert stage.run().outcomes("pay") == ["discarded"]
    assert len(calls) == told


def test_an_error_that_no_decision_can_be_made_on_is_a_dead_letter_that_says_so(monkeypatch, caplog):
    stage = Stage()
    always(stage, PaymentError("declined")).send()

    def broken(*args):
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("dramatiq_policies.middleware.error_classifier.decide", broken)
    stage.run()
    assert (stage.outcomes(), stage.reasons()) == (["dead"], ["handoff_failed"])
    assert "ZeroDivisionError: by nothing" in str(stage.events[0].exception)
    assert len(stage.dead) == 1
    assert "Deciding on message" in caplog.text


def test_a_retry_when_that_raises_leaves_a_dead_letter_that_says_so():
    stage = outcomes_of(PaymentError(), retry_when=lambda retries, error: 1 // 0)
    assert (stage.outcomes(), stage.reasons()) == (["dead"], ["handoff_failed"])
    assert "ZeroDivisionError" in str(stage.events[0].exception)


@pytest.mark.parametrize(
    ("error", "declared", "outcomes"),
    [
        (Refused(), {"discard_on": Refused}, ["discarded"]),
        (Refused(), {"retry_on": {Refused: RetryPolicy(2, wait=constant(1))}}, ["retried", "dead"]),
        (Refused(), {"throws": Refused}, ["dead"]),
        (Refused(), {"max_retries": 1}, ["retried", "dead"]),
        (Shutdown(), {"max_retries": 0}, ["dead"]),
    ],
)
def test_an_error_of_a_middleware_before_the_job_is_decided_on_by_the_actors_rules(error, declared, outcomes):
    stage = Stage(middleware=[Refusing(error)])
    runs = []
    stage.actor(runs.append, actor_name="pay", min_backoff=1, max_backoff=1, **declared).send(1)
    stage.run()
    assert (stage.outcomes(), runs) == (outcomes, [])
