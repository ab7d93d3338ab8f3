"""Retries and next steps are published before the acknowledgement, whatever the broker does."""

from __future__ import annotations

import time

import pytest
from dramatiq import group, pipeline
from dramatiq.errors import ConnectionClosed
from dramatiq.middleware import (
    GroupCallbacks,
)
from dramatiq.rate_limits.backends import StubBackend as RateLimiterStubBackend
from dramatiq.results import Results
from dramatiq.results.backends import StubBackend

from dramatiq_policies import (
    HandoffFailed,
    RetryPolicy,
)
from dramatiq_policies.delivery import publishing

from ..support import Stage
from .scenarios import (
    SOON,
    PaymentError,
    always,
    failing,
    raw,
)


def broken_enqueue(stage, error, times=10**9):
    """From now on the broker does not take messages, `times` times."""
    stock = stage.broker.enqueue
    failed = []

    def enqueue(message, *, delay=None):
        if len(failed) < times:
            failed.append(message)
            raise error
        return stock(message, delay=delay)

    stage.broker.enqueue = enqueue
    return failed


@pytest.mark.parametrize("error", [ConnectionClosed(OSError("gone")), ConnectionResetError()])
def test_a_retry_that_meets_a_lost_connection_is_published_once_it_is_back(impatient, error, caplog):
    stage = Stage()
    failing(stage, PaymentError(), retry_on={PaymentError: SOON}).send()
    failed = broken_enqueue(stage, error, times=20)
    assert stage.run().outcomes() == ["retried", "succeeded"]
    assert len(failed) == 20
    # Which is said at the first try, and not at each.
    assert caplog.text.count("The follow-up messages of message") == 1


def test_an_error_that_is_over_before_the_patience_is_changes_nothing():
    stage = Stage()
    failing(stage, PaymentError(), retry_on={PaymentError: SOON}).send()
    broken_enqueue(stage, RuntimeError("no"), times=2)
    assert stage.run().outcomes() == ["retried", "succeeded"]


def test_a_retry_that_meets_a_lost_connection_is_published_by_a_second_worker_too(impatient):
    stage = Stage()
    pay = failing(stage, PaymentError(), retry_on={PaymentError: SOON})
    stage.run()
    pay.send()
    broken_enqueue(stage, ConnectionResetError(), times=20)
    assert stage.run().outcomes() == ["retried", "succeeded"]


def test_a_retry_that_the_broker_will_not_take_is_dead_and_not_lost(impatient):
    told = []
    stage = Stage(after_discard=lambda message, error: told.append(type(error)))
    always(stage, PaymentError(), retry_on={PaymentError: SOON}).send()
    broken_enqueue(stage, RuntimeError("no"))
    assert stage.run().outcomes() == ["dead"]
    assert stage.reasons() == ["handoff_failed"]
    assert told == [HandoffFailed]
    assert stage.failures()[0]["reason"] == "handoff_failed"
    assert "RuntimeError: no" in stage.failures()[0]["message"]
    assert [run["exception"].rpartition(".")[2] for run in stage.failures()[0]["history"]] == ["PaymentError"]


def test_a_next_step_that_the_broker_will_not_take_is_dead_and_not_lost(impatient):
    stage = Stage()
    pay = failing(stage)
    pipeline([pay.message(), pay.message()], broker=stage.broker).run()
    broken_enqueue(stage, RuntimeError("no"))
    assert stage.run().outcomes() == ["dead"]
    assert stage.reasons() == ["handoff_failed"]


def test_on_retry_exhausted_with_an_unknown_actor_is_logged_and_changes_nothing(caplog):
    stage = Stage()
    always(stage, PaymentError(), retry_on={PaymentError: RetryPolicy(attempts=1)})
    raw(stage, options={"on_retry_exhausted": "nobody"})
    assert stage.run().reasons() == ["exhausted"]
    assert "on_retry_exhausted: this worker has no actor 'nobody'" in caplog.text


def test_on_retry_exhausted_with_an_unknown_actor_changes_nothing_under_stock_options(caplog):
    stage = Stage()
    always(stage, PaymentError(), max_retries=0)
    raw(stage, options={"on_retry_exhausted": "nobody"})
    assert stage.run().reasons() == ["unclassified"]
    assert "on_retry_exhausted: this worker has no actor 'nobody'" in caplog.text


def test_a_failure_that_the_result_backend_will_not_store_is_logged_and_changes_nothing(caplog, monkeypatch):
    results = Results(backend=StubBackend(), store_results=True)
    monkeypatch.setattr(results.backend, "store_exception", None)
    stage = Stage(middleware=[results])
    message = always(stage, PaymentError(), discard_on=PaymentError).send()
    assert stage.run().outcomes() == ["discarded"]
    assert f"The result of message {message.message_id} could not be stored." in caplog.text


def test_a_group_whose_barrier_is_somewhere_else_calls_back_once():
    class Elsewhere:
        """A backend that is neither Dramatiq's for Redis nor the one in memory."""

        def __init__(self):
            self.kept = RateLimiterStubBackend()

        def __getattr__(self, name):
            return getattr(self.kept, name)

    stage = Stage(middleware=[GroupCallbacks(Elsewhere())])
    pay = failing(stage)
    done = failing(stage, name="done")
    members = group([pay.message(), pay.message()], broker=stage.broker)
    members.add_completion_callback(done.message())
    members.run()
    assert stage.run().outcomes("pay") == ["succeeded", "succeeded"]
    assert stage.outcomes("done") == ["succeeded"]


def test_a_publish_given_up_at_shutdown_leaves_the_message_for_the_next_worker(monkeypatch):
    # The shutdown comes during the second pause: a try after the shutdown began would be left to the end of the worker.
    monkeypatch.setattr(publishing, "_RETRY_PAUSES", (0.0, 60.0))
    stage = Stage()
    pay = failing(stage, PaymentError(), retry_on={PaymentError: SOON})
    message = pay.send()
    stock = stage.broker.enqueue
    failed = broken_enqueue(stage, ConnectionClosed(OSError("gone")))
    with stage.working():
        deadline = time.monotonic() + 10
        while len(failed) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
    assert (stage.outcomes()[0], stage.reasons()[0]) == ("interrupted", "handoff_failed")
    stage.broker.enqueue = stock
    stage.run()
    # A thread that was already waiting for work may run it before its worker has stopped.
    assert stage.outcomes() == ["interrupted", "succeeded"]
    assert {event.message_id for event in stage.events} == {message.message_id}
