"""A dead letter names its cause and its history."""

from __future__ import annotations

import json
import time

import pytest

from dramatiq_policies import (
    Discard,
    RetryPolicy,
)

from ..support import Stage
from .scenarios import (
    SOON,
    CardDeclined,
    PaymentError,
    failing,
    outcomes_of,
)


def test_a_dead_letter_says_why():
    stage = Stage()
    errors = [PaymentError("first"), PaymentError("second"), CardDeclined("third")]
    failing(stage, *errors, retry_on={PaymentError: SOON}).send(1, for_="you")
    (failure,) = stage.run().failures()
    assert set(failure) == {
        "outcome",
        "reason",
        "exception",
        "message",
        "traceback",
        "attempts",
        "history",
        "failed_at",
    }
    assert (failure["outcome"], failure["reason"], failure["attempts"]) == ("dead", "exhausted", 3)
    assert (failure["exception"], failure["message"]) == (f"{CardDeclined.__module__}.CardDeclined", "third")
    assert failure["traceback"].endswith("CardDeclined: third\n")
    assert 0 <= time.time() * 1_000 - failure["failed_at"] < 60_000
    assert [(run["attempt"], run["message"], run["delay_ms"]) for run in failure["history"]] == [
        (1, "first", 0),
        (2, "second", 0),
        (3, "third", None),
    ]
    assert set(failure["history"][0]) == {"attempt", "exception", "message", "failed_at", "delay_ms"}
    (letter,) = stage.dead
    assert (list(letter.args), letter.kwargs, letter.queue_name) == ([1], {"for_": "you"}, "default")
    json.loads(letter.encode())


@pytest.mark.parametrize(
    ("error", "declared"),
    [
        (CardDeclined("no"), {"alert_on": CardDeclined}),
        (CardDeclined("no"), {"discard_on": CardDeclined}),
        (Discard("no"), {}),
    ],
)
def test_a_run_that_ended_without_a_retry_is_in_its_dead_letters_history(error, declared):
    (failure,) = outcomes_of(error, dead_letter_discards=True, **declared).failures()
    assert [(run["attempt"], run["message"], run["delay_ms"]) for run in failure["history"]] == [(1, "no", None)]
    assert failure["attempts"] == 1


def test_a_dead_letter_of_the_stock_retries_has_its_history_too():
    stage = outcomes_of(PaymentError("no"), max_retries=1, min_backoff=5, max_backoff=5)
    (failure,) = stage.failures()
    waited = stage.events[0].delay_ms
    assert [(run["attempt"], run["delay_ms"]) for run in failure["history"]] == [(1, waited), (2, None)]


def test_a_dead_letter_has_its_actors_tags():
    stage = Stage()
    failing(stage, CardDeclined, alert_on=CardDeclined, tags={"team": "billing"}).send()
    (failure,) = stage.run().failures()
    assert failure["tags"] == {"team": "billing"}


def test_a_dead_letters_texts_and_history_are_cut():
    def deep(depth):
        if depth:
            deep(depth - 1)
        raise PaymentError("x" * 100_000)

    stage = Stage()

    @stage.actor(retry_on={PaymentError: RetryPolicy(attempts=15, wait=0)})
    def pay():
        deep(100)

    pay.send()
    (failure,) = stage.run().failures()
    assert failure["attempts"] == 15
    assert len(failure["message"]) == 1_000
    assert len(failure["traceback"]) <= 10_000
    assert [run["attempt"] for run in failure["history"]] == list(range(6, 16))
    assert {len(run["message"]) for run in failure["history"]} == {1_000}


def test_an_error_whose_text_is_broken_changes_nothing():
    class Broken(Exception):
        def __str__(self):
            raise RuntimeError

    stage = outcomes_of(Broken(), alert_on=Broken)
    assert stage.outcomes() == ["alerted"]
    assert "RuntimeError" in stage.failures()[0]["message"]
