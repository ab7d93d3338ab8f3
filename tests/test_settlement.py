"""What comes between a decision and its ack, where something fails; the rest is in test_error_classifier.py."""

from __future__ import annotations

import pytest
from dramatiq.results import ResultFailure, ResultMissing, Results
from dramatiq.results.backends import StubBackend

from .support import Stage


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("dramatiq_policies.settlement._PATIENCE", 0.05)
    monkeypatch.setattr("dramatiq_policies.settlement._PAUSES", (0.0, 0.01))


def test_a_message_that_no_decision_was_made_on_is_dead_and_never_acked_as_a_success():
    stage = Stage()
    job = stage.actor(lambda: None, actor_name="job")
    sent = job.send()
    consumer = stage.broker.consume("default")
    consumer.ack(next(consumer))
    assert (stage.outcomes(), stage.reasons()) == (["dead"], ["handoff_failed"])
    assert [letter.message_id for letter in stage.dead] == [sent.message_id]
    assert "came to no decision" in stage.failures()[0]["message"]


def test_a_message_whose_dead_letter_is_refused_too_comes_back(impatient, monkeypatch, caplog):
    stage = Stage()
    job = stage.actor(lambda: 1 / 0, actor_name="job", max_retries=0)
    sent = job.send()

    def refuse(*args):
        raise ValueError("too large")

    with monkeypatch.context() as patch:
        patch.setattr("dramatiq_policies.brokers.stub.StubConsumer.dead_letter", refuse)
        with stage.working():
            stage.collected.wait_for(lambda events: events)
    assert (stage.outcomes(), stage.reasons()) == (["interrupted"], ["handoff_failed"])
    assert "it goes to the dead-letter queue" in caplog.text
    assert stage.dead == []
    assert stage.run().outcomes() == ["interrupted", "dead"]
    assert [letter.message_id for letter in stage.dead] == [sent.message_id]


def test_of_a_message_that_stores_no_results_no_failure_is_stored():
    results = Results(backend=StubBackend())
    stage = Stage(middleware=[results])
    loud, silent = (
        stage.actor(lambda: 1 / 0, actor_name=f"job{store}", max_retries=0, store_results=store).send()
        for store in (True, False)
    )
    assert stage.run().outcomes() == ["dead", "dead"]
    with pytest.raises(ResultFailure, match="division by zero"):
        loud.get_result(backend=results.backend)
    with pytest.raises(ResultMissing):
        silent.get_result(backend=results.backend)
