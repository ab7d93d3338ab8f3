"""Refused dead letters, parked messages, and the pause after unreadable bodies."""

from __future__ import annotations

import pytest

from dramatiq_policies.common import clock
from dramatiq_policies.delivery.refusals import IN_A_ROW, DeadLetterRefusal, Parking, UnreadableBreaker


class Time:
    """A clock that stands until a test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(clock, "monotonic", time)
    return time


def test_a_refusal_begins_once_and_ends_once() -> None:
    refusal = DeadLetterRefusal()
    assert not refusal.active
    assert not refusal.end()
    assert [refusal.begin(), refusal.begin()] == [True, False]
    assert refusal.active
    assert [refusal.end(), refusal.end()] == [True, False]
    assert not refusal.active
    assert refusal.begin()


def test_a_parked_message_is_returned_when_its_wait_is_over(now: Time) -> None:
    parking, returned = Parking(), []
    parking.park(2_000, lambda: returned.append("short"))
    parking.park(5_000, lambda: returned.append("long"))
    parking.return_due()
    assert (returned, len(parking)) == ([], 2)
    now.now += 2.0
    parking.return_due()
    assert (returned, len(parking)) == (["short"], 1)
    parking.return_due(everything=True)
    assert (returned, len(parking)) == (["short", "long"], 0)


def test_the_worker_pauses_after_ten_unreadable_bodies_in_a_row_and_longer_each_time(
    now: Time, caplog: pytest.LogCaptureFixture
) -> None:
    breaker = UnreadableBreaker("mail")
    assert [breaker.unreadable("not JSON") for _ in range(IN_A_ROW - 1)] == [False] * (IN_A_ROW - 1)
    assert not breaker.is_pausing
    assert breaker.seconds_left() == 0.0
    assert not breaker.unreadable("not JSON")
    assert breaker.is_pausing
    pauses = []
    for _ in range(5):
        pauses.append(breaker.seconds_left())
        now.now += pauses[-1]
        assert breaker.seconds_left() == 0.0
        assert breaker.unreadable("not JSON")
    assert pauses == [5.0, 10.0, 20.0, 40.0, 60.0]
    assert len(caplog.records) == 1


def test_a_readable_body_ends_the_pause_and_the_count_begins_anew(now: Time) -> None:
    breaker = UnreadableBreaker("mail")
    for _ in range(IN_A_ROW):
        breaker.unreadable("not JSON")
    breaker.readable()
    assert not breaker.is_pausing
    assert breaker.seconds_left() == 0.0
    for _ in range(IN_A_ROW):
        breaker.unreadable("not JSON")
    assert breaker.seconds_left() == 5.0
