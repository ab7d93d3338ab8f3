"""A duplicate whose arguments differ from those of the first message: logged with that fact, never with the values."""

from __future__ import annotations

import inspect
import logging
import threading

import pytest

from dramatiq_policies import Idempotency
from dramatiq_policies.idempotency import records
from dramatiq_policies.idempotency.fingerprint import covers_all, fingerprint_of
from dramatiq_policies.idempotency.records import Record, completed_by
from dramatiq_policies.stores.memory import MemoryStore

from ..support import Stage

ID = "0f8fad5b-d9cb-469f-a165-70867728950e"


def charge(order_id, amount=5, *, note=None):
    pass


def many(first, *rest, **named):
    pass


def fingerprint(fn, *args, **kwargs):
    return fingerprint_of(inspect.signature(fn))(args, kwargs)


def test_a_call_has_the_same_fingerprint_however_it_is_spelt():
    calls = [((7,), {}), ((7, 5), {}), ((), {"order_id": 7}), ((), {"amount": 5, "order_id": 7, "note": None})]
    assert len({fingerprint(charge, *args, **kwargs) for args, kwargs in calls}) == 1
    assert fingerprint(many, 1, 2, x=1, y=2) == fingerprint(many, 1, 2, y=2, x=1)
    assert fingerprint_of(None)((1,), {"a": {"x": 1, "y": 2}}) == fingerprint_of(None)((1,), {"a": {"y": 2, "x": 1}})


def test_other_calls_have_other_fingerprints():
    calls = [(7,), (8,), ("7",), (7, 6), (7, [5]), (None,), (True,), ("\ud800",)]
    assert len({fingerprint(charge, *args) for args in calls}) == len(calls)
    assert fingerprint(many, 1, 2) != fingerprint(many, 1, 3) != fingerprint(many, 1)


def test_arguments_that_are_no_json_have_none():
    endless = []
    endless.append(endless)
    assert fingerprint(charge, object()) == fingerprint(charge, endless) == fingerprint(charge, {1: 2, "a": 3}) == ""


@pytest.mark.parametrize(
    ("template", "covers"),
    [
        ("{order_id}:{amount}:{note}", True),
        ("{order_id}:{amount}", False),
        ("{order_id}:{amount}:{note:.3}", False),
        ("{order_id}:{amount}:{note!r}", False),
        ("{order_id}:{amount}:{note[0]}", False),
        ("{order_id}:{amount}:{note.name}", False),
        ("constant", False),
    ],
)
def test_a_key_made_of_all_arguments_needs_none(template, covers):
    assert covers_all(template, inspect.signature(charge)) is covers


def test_arguments_that_the_signature_does_not_name_are_never_all_covered():
    assert not covers_all("{first}", inspect.signature(many))


@pytest.mark.parametrize("state", [records.RUNNING, records.WAITING, records.COMPLETED])
def test_a_record_carries_the_fingerprint(state):
    record = Record(state, ID, args="0a1b2c3d")
    assert Record.decode(record.encode()).args == "0a1b2c3d"
    assert Record.decode(record._replace(args="").encode()).args == ""


def test_a_completed_record_grows_by_four_bytes_at_most():
    assert len(completed_by(ID)) == 18
    assert len(completed_by(ID, "0a1b2c3d")) == 22
    assert Record.decode(completed_by("an id of its own", "0a1b2c3d")).message_id == "an id of its own"
    with pytest.raises(records.UnknownRecord):
        Record.decode(completed_by(ID, "0a1b2c3d") + b"x")


class Shared(MemoryStore):
    """As Redis: workers of 0.1.0 may read what it holds."""

    may_hold_earlier_records = True


def stage_on(store=None, **options):
    guard = Idempotency(store or MemoryStore())
    stage = Stage(bundle={"idempotency": guard})

    @stage.actor(idempotency_key="order:{order_id}", **options)
    def ship(order_id, note=None):
        pass

    ship.stage, ship.guard = stage, guard
    return ship


def differing(caplog):
    return [record for record in caplog.records if "other arguments" in record.getMessage()]


@pytest.mark.parametrize("store", [MemoryStore, Shared])
def test_a_duplicate_with_other_arguments_is_a_warning_without_the_values(caplog, store):
    ship = stage_on(store())
    first = ship.send(7, note="secret one")
    other = ship.send(7, note="secret two")
    ship.stage.run()
    assert ship.stage.reasons() == [None, "completed"]
    (record,) = differing(caplog)
    assert record.levelno == logging.WARNING
    assert other.message_id in record.getMessage()
    assert first.message_id in record.getMessage()
    assert "secret" not in caplog.text


def test_a_duplicate_with_the_same_arguments_is_none(caplog):
    ship = stage_on()
    ship.send(7, note="x")
    ship.send(order_id=7, note="x")
    ship.stage.run()
    assert ship.stage.reasons() == [None, "completed"]
    assert differing(caplog) == []


def test_a_callable_key_leaves_arguments_out_too(caplog):
    stage = Stage()
    job = stage.actor(lambda a, b: None, actor_name="job", idempotency_key=lambda a, b: str(a))
    job.send(1, 2)
    job.send(1, 3)
    stage.run()
    assert len(differing(caplog)) == 1


def test_a_duplicate_of_a_running_job_is_one_warning_however_often_it_comes_back(caplog):
    stage = Stage(bundle={"idempotency": Idempotency(lease=1_000)})
    entered, go_on = threading.Event(), threading.Event()

    @stage.actor(idempotency_key="{order_id}")
    def ship(order_id, note):
        entered.set()
        assert go_on.wait(10)

    with stage.working(threads=2):
        ship.send(7, "a")
        assert entered.wait(10)
        ship.send(7, "b")
        stage.collected.wait_for(lambda events: len(events) == 2)
        assert stage.outcomes() == ["deferred", "deferred"]
        assert len(differing(caplog)) == 1
        go_on.set()
        stage.drain()
    assert stage.outcomes()[-1] == "duplicate"
    assert len(differing(caplog)) == 1


def test_a_redelivered_duplicate_is_no_second_warning_and_another_message_is_one(caplog):
    ship = stage_on()
    ship.send(7, note="a")
    ship.stage.run()
    for message in [ship.message(7, note="b")] * 2 + [ship.message(7, note="c")]:
        ship.broker.enqueue(message)
    ship.stage.run()
    assert ship.stage.outcomes() == ["succeeded", "duplicate", "duplicate", "duplicate"]
    assert len(differing(caplog)) == 2


def test_another_process_knows_the_fingerprint(caplog):
    store = MemoryStore()
    for note in ("a", "b"):
        ship = stage_on(store)
        ship.send(7, note=note)
        ship.stage.run()
    assert len(differing(caplog)) == 1


def test_a_register_that_0_1_0_may_read_holds_no_fingerprint(caplog):
    """0.1.0 refuses the longer record: after a rollback its messages would wait."""
    store = Shared()
    for note in ("a", "b"):
        ship = stage_on(store)
        ship.send(7, note=note)
        ship.stage.run()
    ((value, _),) = [entry for key, entry in store._entries.items() if "order:7" in key]
    assert len(value) == 18
    assert differing(caplog) == []
    ship.send(8, note="a")
    ship.send(8, note="b")
    ship.stage.run()
    assert len(differing(caplog)) == 1


class Companions(Shared):
    """As a RedisStore on one server: writes two registers in one step."""

    takes_companions = True

    def put(self, key, value, ttl, *companion):
        super().put(key, value, ttl)
        if companion:
            super().put(f"{key}:arguments", *companion)

    def get_companion(self, key):
        return super().get(f"{key}:arguments")


def test_other_processes_know_the_fingerprint_from_a_companion_for_an_hour(caplog):
    now = [1_000.0]
    store = Companions(lambda: now[0])
    for note in ("a", "b"):
        ship = stage_on(store)
        ship.send(7, note=note)
        ship.stage.run()
    assert len(differing(caplog)) == 1
    now[0] += 3_601
    ship = stage_on(store)
    ship.send(7, note="c")
    ship.stage.run()
    assert ship.stage.reasons() == ["completed"]
    assert len(differing(caplog)) == 1


def test_the_companion_of_another_first_message_counts_for_nothing(caplog):
    store = Companions()
    ship = stage_on(store)
    ship.send(7, note="a")
    ship.stage.run()
    (name,) = [key for key in store._entries if key.startswith("ship") and not key.endswith(":arguments")]
    store.put(name, completed_by(ID), 10_000)
    ship = stage_on(store)
    ship.send(7, note="b")
    ship.stage.run()
    assert ship.stage.reasons() == ["completed"]
    assert differing(caplog) == []
