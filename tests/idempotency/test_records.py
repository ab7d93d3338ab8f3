"""A record is read as it was written, and stays short."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dramatiq_policies.errors import UnknownRecord
from dramatiq_policies.idempotency.records import ENDING, FREE, RUNNING, WAITING, Record, completed_by, released

ID = "6f1c7a52-3a35-4a5e-9d0e-2f4a0c3b1f10"

counts = st.integers(0, 2**53)
RECORDS = st.builds(
    Record,
    state=st.sampled_from([RUNNING, ENDING, WAITING, FREE]),
    message_id=st.text(),
    run=counts,
    owner=st.text(),
    token=st.text(),
    started_at=counts,
    starts=counts,
    retention=counts,
    ended=st.lists(st.tuples(st.text(), counts)).map(tuple),
    retry=st.none() | st.dictionaries(st.text(), st.text() | st.integers()),
)


@given(RECORDS)
def test_a_record_is_read_as_it_was_written(record):
    assert Record.decode(record.encode()) == record


@given(st.text(st.characters(exclude_categories=()) | st.sampled_from("\ud800\0é")) | st.uuids().map(str))
def test_a_completed_key_names_the_message_of_any_id(message_id):
    completed = Record("completed", message_id)
    assert completed.encode() == completed_by(message_id)
    assert Record.decode(completed.encode()) == completed


def test_a_completed_key_takes_18_bytes():
    assert len(completed_by(ID)) == 18


@given(st.binary() | st.binary().map(lambda tail: b"\x01" + tail) | st.binary().map(lambda tail: b"\x01C" + tail))
def test_any_bytes_in_a_store_are_a_record_or_a_clear_error(data):
    try:
        record = Record.decode(data)
    except UnknownRecord:
        return
    assert Record.decode(record.encode()) == record


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x02C" + b"\0" * 16,
        b"\x01Cshort",
        b"\x01[]",
        b"\x01{}",
        b"\x011",
        b"\x01" + b"[" * 100_000,
        b"\x01" + json.dumps({**json.loads(Record(RUNNING).encode()[1:]), "s": "paused"}).encode(),
        b"\x01" + json.dumps({**json.loads(Record(RUNNING).encode()[1:]), "k": "long"}).encode(),
        b"\x01" + json.dumps({**json.loads(Record(RUNNING).encode()[1:]), "e": [["m", float("inf")]]}).encode(),
    ],
)
def test_a_record_of_an_unknown_form_is_never_guessed(data):
    with pytest.raises(UnknownRecord):
        Record.decode(data)


def mine(state=RUNNING, run=1, **fields):
    return Record(state, "m", run, "owner", "t", retention=1_000, **fields)


def theirs(state=RUNNING, **fields):
    return Record(state, "other", 0, "owner", "t", retention=1_000, **fields)


def test_a_key_of_which_nothing_is_to_be_remembered_is_removed():
    assert released(mine(), FREE, ended=False, retention=1) is None


def test_only_the_last_eight_messages_that_ended_are_remembered():
    record = mine(ended=tuple((f"m{number}", 0) for number in range(20)))
    assert record.having_ended() == (*((f"m{number}", 0) for number in range(13, 20)), ("m", 1))


@pytest.mark.parametrize("state", ["running", "ending", "waiting", "free"])
def test_a_stored_record_is_read_by_workers_of_a_later_version(state):
    held = b'\x01{"s":"%s","m":"m","n":2,"o":"host:1:place:5","t":"7","b":3,"c":4,"k":6,"e":[["x",1]]}' % state.encode()
    record = Record(state, "m", 2, "host:1:place:5", "7", 3, 4, 6, (("x", 1),))
    assert record.state in (RUNNING, ENDING, WAITING, FREE)
    assert Record.decode(held) == record
    assert record.encode() == held
