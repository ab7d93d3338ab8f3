"""The record of a key decides on the next action of a message."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dramatiq_policies.idempotency.actions import (
    Quarantine,
    RepublishRetry,
    Request,
    SkipDuplicate,
    Start,
    WaitForOwner,
    claimed,
    next_action,
)
from dramatiq_policies.idempotency.records import _KEPT, ENDING, FREE, WAITING, Record, released

from .test_records import RECORDS, counts, mine, theirs

LIVE, GONE = (lambda record: False), (lambda record: True)
LEFT, OVER = 1_500, 900  # a lease of which 500 ms are left, and one that ended 100 ms ago
RETRY = {"options": {"retries": 2}, "due": None}

TABLE = {
    "nothing is known: it runs": (None, 0, LIVE, Start(1)),
    "it completed itself: its redelivery is skipped": (
        Record("completed", "m"),
        LEFT,
        LIVE,
        SkipDuplicate("completed"),
    ),
    "another completed it: it is skipped, for that one": (
        Record("completed", "other"),
        LEFT,
        LIVE,
        SkipDuplicate("completed", "other"),
    ),
    "another runs: it waits": (theirs(), LEFT, LIVE, WaitForOwner(500)),
    "another runs and its owner is dead: it waits all the same": (theirs(), LEFT, GONE, WaitForOwner(500)),
    "another ran and its lease ended: it runs, and that was a start of the job": (theirs(), OVER, LIVE, Start(2)),
    "another's ran three times, which is no fault of its own yet: it runs, alone": (
        theirs(starts=3),
        OVER,
        LIVE,
        Start(4, alone=True),
    ),
    "another's ran four times, once alone: it is a killer, too": (theirs(starts=4), OVER, LIVE, Quarantine(4)),
    "another waits for its retry: it waits": (theirs(WAITING), LEFT, LIVE, WaitForOwner(500)),
    "another's retry never came: it runs": (
        theirs(WAITING, ended=(("other", 0),)),
        OVER,
        LIVE,
        Start(1, (("other", 0),)),
    ),
    "another hands its retry on: it waits": (theirs(ENDING, retry=RETRY), LEFT, GONE, WaitForOwner(500)),
    "another's retry may never have been handed on: it runs, and that run has not ended": (
        theirs(ENDING, retry=RETRY),
        OVER,
        LIVE,
        Start(1),
    ),
    "the key is free: it runs, and what has ended stays known": (
        theirs(FREE, ended=(("other", 0),)),
        OVER,
        LIVE,
        Start(1, (("other", 0),)),
    ),
    "this run has ended: it is stale": (theirs(FREE, ended=(("m", 1),)), OVER, LIVE, SkipDuplicate("stale")),
    "a later run has ended: it is stale": (theirs(FREE, ended=(("m", 2),)), OVER, LIVE, SkipDuplicate("stale")),
    "an earlier run has ended: it runs": (
        theirs(FREE, ended=(("m", 0),)),
        OVER,
        LIVE,
        Start(1, (("m", 0),)),
    ),
    "a later run is on: it is stale": (mine(run=2), LEFT, LIVE, SkipDuplicate("stale")),
    "its earlier run never said that it ended, but here is the retry: it runs": (
        mine(run=0),
        LEFT,
        LIVE,
        Start(1, (("m", 0),)),
    ),
    "a crash came between its retry and the record, and a copy has taken over: it waits for the copy": (
        mine(run=0, starts=2),
        LEFT,
        LIVE,
        WaitForOwner(500),
    ),
    "the copy that has taken over is dead, too: it runs": (
        mine(run=0, starts=2),
        LEFT,
        GONE,
        Start(1, (("m", 0),)),
    ),
    "the lease of the copy that has taken over has ended: it runs": (
        mine(run=0, starts=2),
        OVER,
        LIVE,
        Start(1, (("m", 0),)),
    ),
    "its retry was waited for: it runs": (
        mine(WAITING, run=0, ended=(("m", 0),)),
        LEFT,
        LIVE,
        Start(1, (("m", 0),)),
    ),
    "this very run is on in a live process: it waits": (mine(), LEFT, LIVE, WaitForOwner(500)),
    "this very run was on in a dead one: it takes over at once": (mine(), LEFT, GONE, Start(2)),
    "this very run was on somewhere, and its lease ended: it takes over": (mine(), OVER, LIVE, Start(2)),
    "it began twice and died: its last start is made alone": (mine(starts=2), LEFT, GONE, Start(3, alone=True)),
    "it began three times and died: it is a killer": (mine(starts=3), LEFT, GONE, Quarantine(3)),
    "this very run is being ended by a live process: it waits": (
        mine(ENDING, retry=RETRY),
        LEFT,
        LIVE,
        WaitForOwner(500),
    ),
    "this very run was being ended by a dead one: its retry is handed on again": (
        mine(ENDING, retry=RETRY),
        LEFT,
        GONE,
        RepublishRetry(RETRY),
    ),
    "it was being ended by a dead one that did not say how: there is nothing to hand on": (
        mine(ENDING),
        LEFT,
        GONE,
        RepublishRetry({}),
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_each_record_has_its_next_action(case):
    record, left, is_dead, answer = TABLE[case]
    found = next_action(record, left, Request("m", 1, is_dead, max_crashes=3))
    # They are tuples, and a number of starts equals a time that is left.
    assert (type(found), found) == (type(answer), answer)


def test_a_retry_waits_for_a_copy_of_an_earlier_run_where_ends_are_recorded_before_retries_are_published():
    """Another message has replaced the recorded end after its lease, and the redelivered run began anew."""
    request = Request("m", 1, LIVE, max_crashes=3, ends_are_recorded=True)
    assert next_action(mine(run=0), LEFT, request) == WaitForOwner(500)
    assert next_action(mine(run=0), OVER, request) == Start(1, (("m", 0),))
    assert next_action(mine(run=0), LEFT, request._replace(is_dead=GONE)) == Start(1, (("m", 0),))
    assert next_action(mine(ENDING, run=0), LEFT, request) == Start(1, (("m", 0),))


def test_a_message_without_a_limit_is_taken_over_for_ever():
    assert next_action(mine(starts=1_000), LEFT, Request("m", 1, GONE)) == Start(1_001)
    assert next_action(theirs(starts=1_000), OVER, Request("m", 1, GONE)) == Start(1_001)


@given(st.none() | RECORDS, st.integers(0, 2**40), st.builds(Request, st.text(), counts, st.sampled_from([LIVE, GONE])))
def test_there_is_an_answer_for_every_record(record, left, request):
    answer = next_action(record, left, request)
    if isinstance(answer, WaitForOwner):
        assert answer.left > 0
    if isinstance(answer, Start) and record is not None:
        # As many as a register keeps, the run at hand among them.
        others = [(message, run) for message, run in record.ended if message != record.message_id]
        assert set(others[1 - _KEPT :]) <= set(answer.ended)


@given(RECORDS, counts)
def test_a_run_that_ended_is_stale_from_then_on(record, retention):
    after = released(record, FREE, ended=True, retention=retention)
    request = Request(record.message_id, record.run, GONE)
    assert next_action(after, 0, request) == SkipDuplicate("stale")
    claim = claimed(
        Start(1, after.ended),
        request._replace(message_id="next"),
        owner="o",
        token="t",
        started_at=0,
        retention=retention,
    )
    assert next_action(claim, 0, request) == SkipDuplicate("stale") or record.message_id == "next"


def test_a_first_start_is_not_made_alone_though_a_limit_of_one_grants_no_other():
    assert next_action(None, 0, Request("m", 0, LIVE, max_crashes=1)) == Start(1)
    assert next_action(None, 0, Request("m", 0, LIVE, max_crashes=2, starts=2)) == Start(2, alone=True)


def test_a_lease_holds_to_its_last_millisecond():
    for record in (mine(), theirs(), theirs(WAITING)):
        assert next_action(record, record.retention + 1, Request("m", 1, LIVE, 3)) == WaitForOwner(1)
        assert next_action(record, record.retention, Request("m", 1, LIVE, 3)) != WaitForOwner(0)


@pytest.mark.parametrize("others", [0, 1], ids=["the same message", "another message"])
def test_a_start_beside_others_is_no_proof_however_many_there_were(others):
    request = Request("m" if not others else "another", 1, GONE, max_crashes=3)
    for starts in (3, 4, 50):
        record = mine(starts=starts, beside=True)
        assert next_action(record, 0, request) == Start(starts + 1, record.ended, alone=True)
        if starts >= 3 + others:
            assert next_action(record._replace(beside=False), 0, request) == Quarantine(starts)
            # A record of 0.1.0 does not say.
            assert next_action(record._replace(beside=None), 0, request) == Quarantine(starts)


def test_a_limit_of_one_counts_every_start_for_none_is_made_alone():
    assert next_action(mine(starts=1, beside=True), 0, Request("m", 1, GONE, max_crashes=1)) == Quarantine(1)


def test_a_claim_says_whether_it_was_made_beside_others():
    request = Request("m", 1, GONE, max_crashes=3)
    for asked, beside in [({}, True), ({"alone": True}, False), ({"beside": True}, True)]:
        claim = claimed(Start(3), request._replace(**asked), owner="o", token="t", started_at=0, retention=1)
        assert claim.beside is beside
        assert Record.decode(claim.encode()) == claim
