"""Errors in the user's own callables change no outcome."""

from __future__ import annotations

import pytest
from dramatiq.middleware import (
    Middleware,
)
from dramatiq.results import ResultFailure, Results
from dramatiq.results.backends import StubBackend

from dramatiq_policies import (
    RetryPolicy,
    when,
)

from ..support import Stage
from .scenarios import (
    SOON,
    Broken,
    PaymentError,
    always,
    failing,
)


def test_an_error_whose_text_is_broken_ends_as_any_other_also_where_results_are_stored():
    backend = StubBackend()
    stage = Stage(middleware=[Results(backend=backend)])
    message = always(stage, Broken(), store_results=True, discard_on=Broken).send()
    with stage.working():
        stage.collected.wait_for(lambda events: events, patience=2)
    assert stage.outcomes() == ["discarded"]
    with pytest.raises(ResultFailure):
        message.get_result(backend=backend)


def test_a_wait_that_raises_still_retries(caplog):
    stage = Stage()
    policy = RetryPolicy(attempts=2, wait=lambda attempt, error: 1 // 0)
    failing(stage, PaymentError(), retry_on={PaymentError: policy}).send()
    with stage.working():
        stage.collected.wait_for(lambda events: events)
    assert stage.outcomes() == ["retried"]
    assert 15_000 <= stage.events[0].delay_ms <= 17_250


def test_a_predicate_that_raises_does_not_match_and_the_next_rule_counts():
    stage = Stage()
    always(stage, PaymentError(), discard_on=when(PaymentError, lambda e: e.code), alert_on=Exception).send()
    assert stage.run().outcomes() == ["alerted"]


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_an_error_that_is_no_exception_is_dead_lettered_as_by_dramatiq_and_the_thread_lives(error):
    stage = Stage()
    always(stage, error, max_retries=0, retry_on=Exception).send()
    assert stage.run().outcomes() == ["dead"]


def test_counters_that_another_middleware_overwrites_are_started_again():
    stage = Stage()

    class Meddling(Middleware):
        def before_process_message(self, broker, message):
            message.options["policies"] = "mine"

    stage.broker.add_middleware(Meddling())
    failing(stage, PaymentError(), retry_on={PaymentError: SOON}).send()
    assert stage.run().outcomes() == ["retried", "succeeded"]


def test_a_worker_whose_broker_refuses_it_permanently_ends_as_the_command_does_for_one_that_is_not_there():
    stage = Stage()
    state = stage.classifier.attached_to
    for state.fatal, state.in_command in ((None, True), (ConnectionError("NOAUTH"), False)):
        stage.classifier.after_worker_shutdown(stage.broker, None)
    state.fatal, state.in_command = ConnectionError("NOAUTH"), True
    with pytest.raises(SystemExit) as ended:
        stage.classifier.after_worker_shutdown(stage.broker, None)
    assert ended.value.code == 3
