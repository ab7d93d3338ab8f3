"""How long messages wait whose key another one holds, and how many of them ask the store."""

from __future__ import annotations

import pytest
from dramatiq import Message

from dramatiq_policies import Idempotency
from dramatiq_policies.common.clock import now_ms
from dramatiq_policies.idempotency import contention
from dramatiq_policies.idempotency.actions import SkipDuplicate, WaitForOwner
from dramatiq_policies.idempotency.contention import _CONTENDED_FROM, _FRESH_FOR, _GRID, WAITS_FOR, Contention
from dramatiq_policies.stores.memory import MemoryStore

from ..support import Stage

LEASE = 60_000


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1_000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(contention, "clock", clock)
    return clock


def many(waiting, answer, number=_CONTENDED_FROM):
    for _ in range(number):
        waiting.observe("k", answer)


def test_a_duplicate_waits_ever_longer_and_at_most_a_quarter_of_the_lease():
    waiting = Contention(LEASE)
    answer = WaitForOwner(LEASE)
    waits = []
    for deferrals in range(7):
        waiting.observe("k", answer)
        waits.append(waiting.wait("k", deferrals, answer))
    assert waits == [1_000, 2_000, 4_000, 8_000, 15_000, 15_000, 15_000]
    assert waiting.wait("k", 6, WaitForOwner(3_000)) == 3_000
    assert waiting.wait("", 6, None) == 15_000


@pytest.mark.parametrize(
    ("age", "least", "most"), [(-10_000, 1_000, 1_000), (6_000, 6_000, 7_000), (10**9, 15_000, 15_000)]
)
def test_the_first_wait_is_as_long_as_the_run_has_lasted(age, least, most):
    assert least <= Contention(LEASE).wait("k", 0, WaitForOwner(LEASE, now_ms() - age)) <= most


def test_many_wait_as_long_as_they_may_and_do_not_come_at_the_same_time(clock):
    waiting = Contention(LEASE)
    many(waiting, WaitForOwner(LEASE))
    waits = [waiting.wait("k", 0, WaitForOwner(LEASE)) for _ in range(1_000)]
    assert 12_000 - _GRID <= min(waits) < 12_200
    assert 14_700 < max(waits) <= 15_000
    assert len({wait // _GRID for wait in waits}) > 20
    # Nor do they when the lease ends.
    waits = [waiting.wait("k", 0, WaitForOwner(2_000)) for _ in range(1_000)]
    assert 2_000 - _GRID <= min(waits) < 2_200
    assert 4_700 < max(waits) <= 5_000


def test_a_single_duplicate_a_second_asks_the_store_and_the_owner_always(clock):
    waiting = Contention(LEASE)
    many(waiting, WaitForOwner(LEASE, 5, "owner"), _CONTENDED_FROM - 1)
    assert waiting.known("k", "other") is None
    many(waiting, WaitForOwner(LEASE, 5, "owner"), 1)
    clock.now += 0.5
    found = waiting.known("k", "other")
    assert (found.left, found.started_at, found.message_id) == (LEASE - 500, 5, "owner")
    assert waiting.known("k", "owner") is None
    assert waiting.known("another", "other") is None
    clock.now += _FRESH_FOR
    assert waiting.known("k", "other") is None


def test_an_answer_does_not_hold_for_longer_than_the_lease(clock):
    waiting = Contention(LEASE)
    many(waiting, WaitForOwner(300))
    clock.now += 0.4
    assert waiting.known("k", "other") is None


def test_many_are_few_again_after_a_while(clock):
    waiting = Contention(LEASE)
    many(waiting, WaitForOwner(LEASE))
    clock.now += 16
    waiting.observe("k", WaitForOwner(LEASE))
    assert waiting.keys["k"].is_contended
    clock.now += 40
    waiting.observe("k", WaitForOwner(LEASE))
    assert not waiting.keys["k"].is_contended


def test_however_many_keys_there_are_few_are_remembered(clock):
    waiting = Contention(LEASE)
    for number in range(5_000):
        clock.now += 0.01
        waiting.observe(str(number), WaitForOwner(LEASE))
    assert len(waiting.keys) <= 1_000


def due(name="k", **options):
    return Message("q", "a", (), {}, {WAITS_FOR: name, **options}, message_id="duplicate")


def postponed(waiting, number, message=None):
    """How many of so many due messages stay in the delay queue."""
    return sum(waiting.postpone(message or due()) is not None for _ in range(number))


def test_due_messages_of_a_key_that_is_known_to_be_held_stay_in_the_delay_queue(clock):
    waiting = Contention(LEASE)
    many(waiting, WaitForOwner(LEASE, 5, "owner"))
    waits = [waiting.postpone(due()) for _ in range(1_000)]
    assert min(waits) >= 12_000 - _GRID
    assert max(waits) <= 15_000


@pytest.mark.parametrize(
    "message",
    [
        due("another"),
        due(None),
        due(["k"]),
        due(redelivered=True),
        Message("q", "a", (), {}, {WAITS_FOR: "k"}, message_id="owner"),
        Message("q", "a", (), {}, {}, message_id="retry"),
    ],
)
def test_any_other_due_message_moves(clock, message):
    waiting = Contention(LEASE)
    many(waiting, WaitForOwner(LEASE, 5, "owner"))
    assert waiting.postpone(message) is None


def test_once_a_second_one_of_many_due_messages_moves_and_asks(clock):
    waiting = Contention(LEASE)
    many(waiting, WaitForOwner(LEASE, 5, "owner"))
    clock.now += _FRESH_FOR + 0.1
    assert postponed(waiting, 100) == 99
    clock.now += _FRESH_FOR + 0.1
    assert postponed(waiting, 100) == 99
    waiting.observe("k", WaitForOwner(LEASE, 5, "owner"), counted=True)
    assert postponed(waiting, 100) == 100


def test_few_due_messages_move_at_once(clock):
    waiting = Contention(LEASE)
    assert postponed(waiting, _CONTENDED_FROM - 1) == 0


def test_in_a_process_that_knows_nothing_of_a_key_many_do_not_move_at_once_either(clock):
    waiting = Contention(LEASE)
    assert postponed(waiting, 1_000) == 1_000 - _CONTENDED_FROM
    assert waiting.postpone(due()) <= 1_000


def test_when_the_key_is_free_due_messages_move_a_few_at_a_time(clock):
    waiting = Contention(LEASE)
    many(waiting, WaitForOwner(LEASE, 5, "owner"))
    moved = 0
    for _ in range(100):
        waiting.observe("k", SkipDuplicate("completed", "owner"))
        moved += 200 - postponed(waiting, 200)
        clock.now += 0.1
    assert 4_900 <= moved <= 5_100


def test_a_wait_is_at_most_a_quarter_of_a_short_lease_too(clock):
    waiting = Contention(400)
    waits = [waiting.postpone(due()) for _ in range(100)]
    many(waiting, WaitForOwner(400, 5, "owner"))
    waits += [waiting.postpone(due()) for _ in range(100)]
    assert all(wait <= 100 for wait in waits if wait is not None)


def test_many_duplicates_of_a_running_job_ask_the_store_seldom_and_none_is_lost(monkeypatch):
    class Counting(MemoryStore):
        asked = 0

        def swap(self, *args):
            self.asked += 1
            return super().swap(*args)

    store = Counting()
    stage = Stage(bundle={"idempotency": Idempotency(store, lease=4_000)})
    runs = []

    @stage.actor(idempotency_key="{number}")
    def job(number):
        for _ in range(200):
            job.send(number)
        stage.collected.wait_for(lambda events: len(events) >= 200)
        runs.append(number)

    with stage.working(threads=2):
        job.send(7)
        stage.drain()
    assert runs == [7]
    outcomes = [event.outcome.value for event in stage.events]
    assert outcomes.count("duplicate") == 200
    assert outcomes.count("succeeded") == 1
    # Each duplicate asks at least once more, when the job is done.
    deferred = [event for event in stage.events if event.outcome == "deferred"]
    assert len(deferred) >= 200
    assert store.asked < len(stage.events)
    assert all(event.delay_ms <= 1_000 for event in deferred)
