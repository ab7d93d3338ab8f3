"""Records that 0.1.0 left under the name that it gave a key."""

from __future__ import annotations

import pytest

from dramatiq_policies import Idempotency
from dramatiq_policies.idempotency import actions, records
from dramatiq_policies.idempotency.claims import Claims
from dramatiq_policies.idempotency.earlier import EarlierRecords
from dramatiq_policies.idempotency.records import Record, completed_by
from dramatiq_policies.stores.memory import MemoryStore

from ..support import Stage

DAY = 86_400_000
#: Values with the key "7" in 0.1.0, beside the int, whose register is still the same.
TEXT = "7"


class Shared(MemoryStore):
    """As Redis: workers of 0.1.0 share it."""

    may_hold_earlier_records = True


class App:
    def __init__(self):
        self.now = 1_000.0
        self.store = Shared(lambda: self.now)
        self.stage = Stage(bundle={"idempotency": Idempotency(self.store)})
        self.runs = []

        @self.stage.actor(idempotency_key="{number}")
        def job(number):
            self.runs.append(number)

        self.job = job

    @property
    def claims(self):
        return next(one for one in self.stage.broker.middleware if isinstance(one, Idempotency)).claims

    @property
    def earlier(self):
        return self.claims.earlier

    def old(self, record, left=DAY):
        value = record if isinstance(record, bytes) else record.encode()
        self.store.put("job\x007", value, left)


@pytest.fixture
def app(monkeypatch):
    app = App()
    monkeypatch.setattr("dramatiq_policies.idempotency.earlier.clock.monotonic", lambda: app.now)
    return app


def running(message_id="theirs", **more):
    return Record(records.RUNNING, message_id, owner="elsewhere:1:place:1", token="1", retention=1_000, **more)


def test_a_running_claim_of_0_1_0_is_honoured(app):
    app.old(running(), 1_000 + 30_000)
    message = app.job.message(TEXT)
    claims = app.claims
    answer = claims.claim("new", request(message), keyed=True, retention=DAY, earlier="job\x007")
    assert answer == actions.WaitForOwner(30_000)
    assert Idempotency.state(app.job, TEXT).state == "running"
    assert Idempotency.state(app.job, TEXT).message_id == "theirs"


def request(message):
    return actions.Request(message.message_id, 0, lambda record: False, 3)


def test_the_starts_counted_by_0_1_0_go_on(app):
    message = app.job.message(TEXT)
    app.old(running(message.message_id, starts=2))
    claims = app.claims
    dead = request(message)._replace(is_dead=lambda record: True)
    answer = claims.claim("new", dead, keyed=True, retention=DAY, earlier="job\x007")
    assert answer == actions.Start(3, alone=True)
    app.old(running(message.message_id, starts=3))
    answer = claims.claim("new", dead, keyed=True, retention=DAY, earlier="job\x007")
    assert answer.starts == 3
    assert answer.claim.name == "job\x007"
    claims.close()


def test_a_run_that_has_ended_under_0_1_0_is_stale(app):
    message = app.job.message(TEXT)
    app.old(Record(records.FREE, "theirs", retention=1_000, ended=((message.message_id, 0),)))
    app.stage.broker.enqueue(message)
    app.stage.run()
    assert app.stage.reasons() == ["stale"]


def test_a_job_that_was_completed_before_the_first_newer_worker_came_is_a_duplicate(app):
    app.old(completed_by("theirs"))
    app.now += 60
    app.earlier.mark()
    app.now += 60
    app.job.send(TEXT)
    app.stage.run()
    assert app.stage.reasons() == ["completed"]
    assert Idempotency.state(app.job, TEXT).state == "completed"
    assert Idempotency.forget(app.job, TEXT)
    app.job.send(TEXT)
    app.stage.run()
    assert app.runs == [TEXT]


@pytest.mark.parametrize("marked", [True, False])
def test_a_job_with_the_same_text_that_a_newer_worker_completed_is_another_one(app, marked):
    if marked:
        app.earlier.mark()
    app.now += 60
    app.job.send(7)
    app.stage.run()
    app.now += 60
    assert Idempotency.state(app.job, TEXT).state == "none"
    assert not Idempotency.forget(app.job, TEXT)
    app.job.send(TEXT)
    app.job.send(7)
    app.job.send(TEXT)
    app.stage.run()
    assert app.runs == [7, TEXT]


def test_a_job_with_the_same_text_that_a_newer_worker_runs_is_another_one(app):
    app.old(running()._replace(beside=True))
    app.job.send(TEXT)
    app.stage.run()
    assert app.stage.outcomes() == ["succeeded"]


def test_the_mark_keeps_the_time_of_the_first(app):
    app.earlier.mark()
    app.now += 1_000
    another = Claims(app.store, 60_000).earlier
    another.mark()
    assert another.marked == app.earlier.marked
    third = Claims(app.store, 60_000).earlier
    assert third.find("job\x007", DAY) is None
    assert third.marked == app.earlier.marked


def test_records_of_0_1_0_are_not_looked_up_once_all_have_expired(app):
    app.earlier.mark()
    app.old(running(), 365 * DAY)
    assert app.earlier.find("job\x007", DAY) is not None
    app.now += 16 * DAY / 1_000
    assert app.earlier.find("job\x007", DAY) is None


class Counting(MemoryStore):
    calls = 0

    def get(self, key):
        self.calls += 1
        return super().get(key)

    def swap(self, *args):
        self.calls += 1
        return super().swap(*args)


class SharedAndEmpty(Counting):
    """As a RedisStore: says whether it holds a record of any version."""

    may_hold_earlier_records = True

    def is_empty(self):
        return not self._entries


def test_a_store_that_was_empty_before_the_first_newer_worker_is_never_asked_for_records_of_0_1_0():
    store = SharedAndEmpty()
    first, second, without_worker = (Claims(store, 60_000).earlier for _ in range(3))
    first.mark()
    store.put("job\x007", completed_by("mine"), DAY)
    second.mark()
    assert without_worker.find("job\x007", DAY) is None
    store.calls = 0
    assert [one.find("job\x007", DAY) for one in (first, second, without_worker)] == [None] * 3
    assert store.calls == 0


def test_a_store_with_records_before_the_first_newer_worker_is_asked_for_records_of_0_1_0():
    store = SharedAndEmpty()
    store.put("job\x007", running().encode(), DAY)
    for _ in range(2):
        earlier = Claims(store, 60_000).earlier
        earlier.mark()
        assert earlier.find("job\x007", DAY) is not None


def test_the_arguments_of_many_keys_are_remembered_but_not_without_end(app, monkeypatch):
    monkeypatch.setattr("dramatiq_policies.idempotency.earlier._REMEMBERED", 3)
    earlier = EarlierRecords(app.store, lambda call: call())
    completed = [Record(records.COMPLETED, f"message {number}", args=f"0000000{number}") for number in range(4)]
    for record in completed[:3]:
        earlier.completion(f"register of {record.message_id}", record, DAY)
    for record in completed[:3]:
        assert earlier.with_arguments(f"register of {record.message_id}", record._replace(args="")) == record
    earlier.completion("another register", completed[3], DAY)
    assert len(earlier._arguments) <= 3
    assert earlier.with_arguments("another register", completed[3]._replace(args="")) == completed[3]


def test_a_store_that_0_1_0_never_used_is_not_asked_for_its_records():
    store = Counting()
    claims = Claims(store, 60_000)
    claims.earlier.mark()
    assert claims.earlier.find("job\x007", DAY) is None
    assert store.calls == 0
    asked = actions.Request("mine", 0, lambda record: False)
    claims.drop(claims.claim("new", asked, keyed=True, retention=DAY, earlier="job\x007"))
    claims.close()
    assert store.calls == 1
