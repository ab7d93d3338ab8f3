"""The record of a delivery's end, as its readers get it."""

from __future__ import annotations

import json

import pytest
from dramatiq import Message

from dramatiq_policies import Outcome, OutcomeEvent
from dramatiq_policies.outcomes import BAD_ENDINGS, extra_of, text_of, traceparent_of


def test_an_outcome_is_the_text_that_dashboards_know():
    assert [str(outcome) for outcome in Outcome] == [
        "succeeded",
        "retried",
        "discarded",
        "alerted",
        "dead",
        "duplicate",
        "deferred",
        "expired",
        "interrupted",
        "skipped",
    ]
    assert Outcome.DEAD == "dead"
    assert f"{Outcome.DEAD:>5}" == " dead"
    assert json.dumps(Outcome.DEAD) == '"dead"'


def test_a_permanent_failure_never_runs_again():
    assert {str(outcome) for outcome in BAD_ENDINGS} == {"discarded", "alerted", "dead", "expired"}


def test_a_log_record_has_every_field_and_none_where_nothing_applies():
    assert OutcomeEvent(outcome=Outcome.SUCCEEDED).extra() == {
        "outcome": "succeeded",
        "reason": None,
        "actor": None,
        "queue": None,
        "message_id": None,
        "attempt": None,
        "exception_type": None,
        "exception_text": None,
        "duration_ms": None,
        "rule": None,
        "tags": None,
    }
    event = OutcomeEvent(
        outcome=Outcome.DEAD,
        reason="exhausted",
        actor="pay",
        queue="mail",
        message_id="m",
        attempt=3,
        duration_ms=1.5,
        exception=ValueError("no"),
        rule="builtins.ValueError",
        tags={"team": "billing"},
    )
    assert event.extra() == {
        "outcome": "dead",
        "reason": "exhausted",
        "actor": "pay",
        "queue": "mail",
        "message_id": "m",
        "attempt": 3,
        "exception_type": "builtins.ValueError",
        "exception_text": "no",
        "duration_ms": 1.5,
        "rule": "builtins.ValueError",
        "tags": {"team": "billing"},
    }


@pytest.mark.parametrize(
    ("given", "passed_on"), [("x" * 200, "x" * 200), ("x" * 201, "x" * 200), ("", None), (5, None)]
)
def test_a_traceparent_is_a_text_of_at_most_200_characters(given, passed_on):
    message = Message("default", "pay", (), {}, {"traceparent": given})
    assert (
        traceparent_of(message) == extra_of(OutcomeEvent(outcome=Outcome.DEAD), message).get("traceparent") == passed_on
    )


def test_an_errors_text_is_cut_at_its_limit():
    assert text_of(ValueError("x" * 1_000)) == "x" * 1_000
    assert text_of(ValueError("x" * 1_001)) == "x" * 999 + "…"
