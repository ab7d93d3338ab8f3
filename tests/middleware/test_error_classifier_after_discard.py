"""after_discard and on_outcome are called for permanent failures."""

from __future__ import annotations

import dramatiq
import pytest
from dramatiq.brokers.stub import StubBroker

from dramatiq_policies import (
    Discard,
    ErrorClassifier,
    QueueTimeoutExceeded,
    Snooze,
    install,
)
from dramatiq_policies.delivery.broker_state import state_of

from ..support import Stage
from .scenarios import (
    SOON,
    CardDeclined,
    PaymentError,
    always,
    failing,
    outcomes_of,
    raw,
)


def test_after_discard_runs_once_the_actors_before_the_brokers():
    calls = []
    stage = Stage(after_discard=lambda message, error: calls.append(("broker", message.args, error)))
    error = PaymentError()
    options = {
        "retry_on": {PaymentError: SOON},
        "after_discard": lambda message, error: calls.append(("actor", message.args, error)),
    }
    always(stage, error, **options).send(7)
    stage.run()
    assert calls == [("actor", (7,), error), ("broker", (7,), error)]


@pytest.mark.parametrize(
    ("error", "options", "calls"),
    [
        (CardDeclined(), {"discard_on": CardDeclined}, 1),
        (CardDeclined(), {"alert_on": CardDeclined}, 1),
        (CardDeclined(), {"max_retries": 0}, 1),
        (CardDeclined(), {"throws": CardDeclined}, 1),
        (Discard(), {}, 1),
    ],
)
def test_after_discard_is_called_for_each_failure(error, options, calls):
    told = []
    outcomes_of(error, after_discard=lambda message, error: told.append(error), **options)
    assert told == [error] * calls


def test_after_discard_is_not_called_for_retries_snoozes_and_successes():
    told = []
    stage = Stage(after_discard=lambda message, error: told.append(error))
    failing(stage, PaymentError(), Snooze(0), retry_on={PaymentError: SOON}).send()
    assert stage.run().outcomes() == ["retried", "deferred", "succeeded"]
    assert told == []


def test_after_discard_gets_a_stand_in_where_the_job_raised_nothing():
    told = []
    stage = Stage(after_discard=lambda message, error: told.append(type(error)))
    failing(stage, queue_timeout=60_000)
    raw(stage)
    stage.run()
    assert told == [QueueTimeoutExceeded]


def test_an_after_discard_that_raises_is_logged_and_changes_nothing(caplog):
    told = []
    stage = Stage(after_discard=lambda message, error: told.append(error))
    always(stage, CardDeclined(), discard_on=CardDeclined, after_discard=lambda message, error: 1 // 0).send()
    assert stage.run().outcomes() == ["discarded"]
    assert len(told) == 1
    assert "ZeroDivisionError" in caplog.text


def test_a_subscriber_that_raises_keeps_no_other_from_the_record(caplog):
    seen = []
    broker = StubBroker()
    install(broker, error_classifier=ErrorClassifier(on_outcome=(lambda event: 1 // 0, seen.append)))
    dramatiq.actor(lambda: None, actor_name="pay", broker=broker).send()
    worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=1)
    worker.start()
    broker.join("default", timeout=10_000)
    worker.stop()
    assert [event.outcome for event in seen] == ["succeeded"]
    assert "ZeroDivisionError" in caplog.text


def test_a_success_without_subscribers_makes_no_record():
    silent, told = (install(StubBroker(), error_classifier=ErrorClassifier(on_outcome=o)) for o in (None, print))
    assert not state_of(silent).outcomes.successes_observed
    assert state_of(told).outcomes.successes_observed
