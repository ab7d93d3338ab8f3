"""The history that a message carries, and how the worker reads the history."""

from __future__ import annotations

import json

import pytest

from dramatiq_policies import Outcome
from dramatiq_policies.delivery.decision import Decision
from dramatiq_policies.delivery.history import History, attempt_of, failure_of, replays_of, run_of

NOW = 1_700_000_000_000
RUBBISH = [None, "x", [], {}, True, 1.5, -1, 2**53]


def carried(**policies):
    return {"policies": policies}


def test_attempts_are_stocks_and_our_rules_together():
    assert attempt_of({}) == 1
    assert attempt_of({"retries": 2, **carried(total=3)}) == 6
    assert attempt_of(carried(total=2**53 - 1)) == 2**53


def test_a_run_has_a_number_of_its_own_after_each_failure_snooze_and_replay():
    pasts = [{}, carried(total=1), {"retries": 1, **carried(total=1)}, carried(total=1, snoozes=3)]
    pasts += [carried(replays=1), {"failure": {}, **carried(replays=1)}, carried(replays=3, snoozes=1)]
    assert [run_of(past) for past in pasts] == [0, 1, 2, 4, 1_000_000, 2_000_000, 3_000_001]


def test_a_replay_by_another_command_is_known_by_the_failure_that_it_left():
    assert [replays_of(past) for past in ({}, {"failure": None}, carried(replays=2))] == [0, 1, 2]


@pytest.mark.parametrize("rubbish", RUBBISH)
def test_an_unreadable_counter_is_taken_as_absent(rubbish):
    for options in (
        {"policies": rubbish, "retries": rubbish},
        carried(total=rubbish, snoozes=rubbish, replays=rubbish, deferrals=rubbish, snoozed_since=rubbish),
        carried(runs=rubbish, history=rubbish),
        carried(runs={"rule": rubbish}, history=[rubbish] if rubbish != {} else []),
        carried(runs={"rule": [rubbish, NOW]}),
        carried(runs={"rule": [1, rubbish]}),
        carried(runs={"rule": [1, NOW, 1]}),
    ):
        assert History(options).option() == {"runs": {}, "total": 0, "history": []}
        assert (attempt_of(options), run_of(options), replays_of(options)) == (1, 0, 0)


def test_a_history_is_read_as_it_was_written():
    history = History({})
    assert history.count("rule", NOW) == (1, NOW)
    assert history.count("rule", NOW + 5) == (2, NOW)
    assert history.count("other", NOW + 7) == (1, NOW + 7)
    history.failed(ValueError("no"), NOW, 5)
    history.snoozed_since, history.snoozes, history.deferrals, history.replays = NOW, 1, 2, 3
    option = json.loads(json.dumps(history.option()))
    assert option == {
        "runs": {"rule": [2, NOW], "other": [1, NOW + 7]},
        "total": 3,
        "history": [
            {"attempt": 1, "exception": "builtins.ValueError", "message": "no", "failed_at": NOW, "delay_ms": 5}
        ],
        "snoozed_since": NOW,
        "snoozes": 1,
        "deferrals": 2,
        "replays": 3,
    }
    again = History({"policies": option})
    assert again.option() == option
    assert again.attempt == 4


def test_the_last_ten_failures_are_kept():
    history = History(carried(history=[{"attempt": number} for number in range(20)]))
    assert [failure["attempt"] for failure in history.failures] == list(range(10, 20))
    history.failed(ValueError(), NOW, None)
    assert [failure["attempt"] for failure in history.failures] == [*range(11, 20), 1]


def test_a_failure_counts_the_attempts_that_were_decided_on_or_else_those_of_the_message():
    options = {"retries": 1}
    assert failure_of(Decision(Outcome.DEAD, attempt=5), options)["attempts"] == 5
    assert failure_of(Decision(Outcome.EXPIRED), options)["attempts"] == 2


def test_a_failure_without_an_error_names_none():
    failure = failure_of(Decision(Outcome.DEAD, "malformed"), {})
    assert (failure["outcome"], failure["reason"]) == ("dead", "malformed")
    assert failure["exception"] is failure["message"] is failure["traceback"] is None
    assert "tags" not in failure
