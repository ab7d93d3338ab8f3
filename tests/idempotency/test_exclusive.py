"""One job runs while nothing else runs in its process."""

from __future__ import annotations

import threading

import pytest

from dramatiq_policies.idempotency import exclusive as module
from dramatiq_policies.idempotency.exclusive import ExclusiveRuns


class Job:
    """A job on a thread of its own."""

    def __init__(self, exclusive, *, alone=False):
        self.exclusive = exclusive
        self.alone = alone
        self.began, self.end = threading.Event(), threading.Event()
        self.beside = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        self.exclusive.enter(self)
        try:
            if self.alone:
                self.exclusive.make_alone(self)
            self.beside = len(self.exclusive.running) - 1
            self.began.set()
            assert self.end.wait(10)
        finally:
            self.exclusive.leave(self)

    def finish(self):
        self.end.set()
        self.thread.join()


def begins(job, within=10.0):
    return job.began.wait(within)


def test_jobs_run_beside_each_other():
    exclusive = ExclusiveRuns()
    one, other = Job(exclusive), Job(exclusive)
    assert begins(one)
    assert begins(other)
    one.finish()
    other.finish()
    assert exclusive.running == set()


def test_a_job_waits_until_it_is_alone_and_keeps_others_out():
    exclusive = ExclusiveRuns()
    before = Job(exclusive)
    assert begins(before)
    alone = Job(exclusive, alone=True)
    assert not begins(alone, 0.05)
    before.finish()
    assert begins(alone)
    after = Job(exclusive)
    assert not begins(after, 0.05)
    alone.finish()
    assert begins(after)
    assert (alone.beside, after.beside) == (0, 0)
    after.finish()


def test_several_jobs_that_must_be_alone_run_in_turn():
    exclusive = ExclusiveRuns()
    jobs = [Job(exclusive, alone=True) for _ in range(4)]
    for _ in jobs:
        (running,) = solitude_of(exclusive)
        assert begins(running)
        assert running.beside == 0
        running.finish()
    assert exclusive.running == set()


def solitude_of(exclusive):
    with exclusive._changed:
        assert exclusive._changed.wait_for(lambda: len(exclusive.running) == 1, 10)
        return set(exclusive.running)


def test_a_wait_for_a_job_alone_ends_after_a_limit(monkeypatch):
    monkeypatch.setattr(module, "_WAIT_FOR_OTHERS", 0.05)
    monkeypatch.setattr(module, "_ALONE_FOR", 0.05)
    exclusive = ExclusiveRuns()
    long = Job(exclusive)
    assert begins(long)
    alone = Job(exclusive, alone=True)
    assert begins(alone)
    assert alone.beside == 1
    other = Job(exclusive)
    assert begins(other)
    for job in (long, alone, other):
        job.finish()
    quick = Job(exclusive)
    assert begins(quick)
    quick.finish()


@pytest.mark.parametrize("alone", [False, True])
def test_a_job_that_fails_leaves_too(alone):
    exclusive = ExclusiveRuns()
    job = object()
    exclusive.enter(job)
    if alone:
        exclusive.make_alone(job)
    exclusive.leave(job)
    exclusive.leave(job)
    following = Job(exclusive)
    assert begins(following)
    following.finish()


def test_a_job_that_can_not_be_alone_in_time_is_marked_and_keeps_no_other_out(monkeypatch):
    monkeypatch.setattr(module, "_WAIT_FOR_OTHERS", 0.05)
    exclusive = ExclusiveRuns()
    long, wanting = object(), object()
    exclusive.enter(long)
    exclusive.enter(wanting)
    assert not exclusive.make_alone(wanting)
    assert exclusive.is_open
    exclusive.leave(long)
    assert exclusive.make_alone(wanting)


def test_a_second_job_that_must_be_alone_does_not_begin_beside_the_first(monkeypatch):
    monkeypatch.setattr(module, "_WAIT_FOR_OTHERS", 0.05)
    exclusive = ExclusiveRuns()
    first, second = object(), object()
    exclusive.enter(first)
    assert exclusive.make_alone(first)
    assert not exclusive.make_alone(second)
    assert not exclusive.is_open


def test_a_job_that_waits_too_long_for_one_alone_exposes_that_one_first(monkeypatch):
    monkeypatch.setattr(module, "_ALONE_FOR", 0.05)
    monkeypatch.setattr(module, "_RECORD_AGAIN_AFTER", 0.01)
    answers, asked = [True, False, False], []

    def expose(delivery):
        asked.append((delivery, set(exclusive.running)))
        return answers.pop()

    exclusive = ExclusiveRuns(expose)
    alone = object()
    exclusive.enter(alone)
    assert exclusive.make_alone(alone)
    other = Job(exclusive)
    assert begins(other)
    # The store was asked until it had recorded that, and nothing else ran so far.
    assert asked == [(alone, {alone})] * 3
    other.finish()


def test_each_start_that_proved_nothing_gives_the_next_one_twice_the_time(monkeypatch):
    monkeypatch.setattr(module, "_ALONE_FOR", 30)
    now = 1_000.0
    monkeypatch.setattr(module, "monotonic", lambda: now)
    for unproven, seconds in [(0, 30), (1, 60), (3, 240), (5, 600), (10**6, 600)]:
        exclusive = ExclusiveRuns()
        assert exclusive.make_alone(object(), unproven)
        assert exclusive._alone_until == now + seconds
