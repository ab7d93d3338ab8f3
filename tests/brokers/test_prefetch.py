"""The places of messages in hand, without a server."""

from __future__ import annotations

import threading
import time

import pytest

from dramatiq_policies.brokers.redis.prefetch import PrefetchWindow


@pytest.fixture
def full():
    places = PrefetchWindow(set(), 4)
    for number in range(4):
        assert places.take(f"r{number}")
    return places


def seconds_of(call, *args):
    started = time.monotonic()
    call(*args)
    return time.monotonic() - started


def test_a_fetch_does_not_wait_while_the_window_has_room(full):
    full.release("r0")
    assert full.taken == 3
    assert seconds_of(full.wait, 20) < 10


def test_a_waiting_fetch_goes_on_once_half_of_the_window_is_free(full):
    class Room(threading.Event):
        def wait(self, seconds):
            for one in ("r0", "r1"):
                full.job_finished(one)
                free.append(self.is_set())
            return super().wait(seconds)

    free = []
    full._room = Room()
    assert seconds_of(full.wait, 20) < 10
    assert free == [False, True]
    assert full.taken == 2


def test_a_message_whose_ack_is_under_way_takes_no_room_and_is_still_in_flight(full):
    full.job_finished("r0")
    full.job_finished("r0")
    assert full.taken == 3
    assert not full.take("r0")
    full.release("r0")
    assert full.taken == 3


def test_a_message_in_flight_when_fetched_is_not_taken_although_it_was_acked_since(full):
    full.about_to_fetch()
    full.release("r0")
    assert not full.take("r0")
    full.about_to_fetch()
    assert full.take("r0")
