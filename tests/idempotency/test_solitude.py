"""One job runs while nothing else runs in its process."""

from __future__ import annotations

import threading

import pytest

from dramatiq_policies.idempotency import exclusive as module
from dramatiq_policies.idempotency.exclusive import Solitude


class Job:
    """A job on a thread of its own."""

    def __init__(self, solitude, *, alone=False):
        self.solitude = solitude
        self.alone = alone
        self.began, self.end = threading.Event(), threading.Event()
        self.beside = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        self.solitude.enter(self)
        try:
            if self.alone:
                self.solitude.make_alone(self)
            self.beside = len(self.solitude.running) - 1
            self.began.set()
            assert self.end.wait(10)
        finally:
            self.solitude.leave(self)

    def finish(self):
        self.end.set()
        self.thread.join()


def begins(job, within=10.0):
    return job.began.wait(within)


def test_jobs_run_beside_each_other():
    solitude = Solitude()
    one, other = Job(solitude), Job(solitude)
    assert begins(one)
    assert begins(other)
    one.finish()
    other.finish()
    assert solitude.running == set()


def test_a_job_waits_until_it_is_alone_and_keeps_others_out():
    solitude = Solitude()
    before = Job(solitude)
    assert begins(before)
    alone = Job(solitude, alone=True)
    assert not begins(alone, 0.05)
    before.finish()
    assert begins(alone)
    after = Job(solitude)
    assert not begins(after, 0.05)
    alone.finish()
    assert begins(after)
    assert (alone.beside, after.beside) == (0, 0)
    after.finish()


def test_of_several_one_at_a_time_runs_alone():
    solitude = Solitude()
    jobs = [Job(solitude, alone=True) for _ in range(4)]
    for _ in jobs:
        (running,) = solitude_of(solitude)
        assert begins(running)
        assert running.beside == 0
        running.finish()
    assert solitude.running == set()


def solitude_of(solitude):
    with solitude._changed:
        assert solitude._changed.wait_for(lambda: len(solitude.running) == 1, 10)
        return set(solitude.running)


def test_nobody_waits_for_ever(monkeypatch):
    monkeypatch.setattr(module, "_OTHERS_MAY_TAKE", 0.05)
    monkeypatch.setattr(module, "_ALONE_AT_MOST", 0.05)
    solitude = Solitude()
    long = Job(solitude)
    assert begins(long)
    alone = Job(solitude, alone=True)
    assert begins(alone)
    assert alone.beside == 1
    other = Job(solitude)
    assert begins(other)
    for job in (long, alone, other):
        job.finish()
    quick = Job(solitude)
    assert begins(quick)
    quick.finish()


@pytest.mark.parametrize("alone", [False, True])
def test_a_job_that_fails_leaves_too(alone):
    solitude = Solitude()
    job = object()
    solitude.enter(job)
    if alone:
        solitude.make_alone(job)
    solitude.leave(job)
    solitude.leave(job)
    following = Job(solitude)
    assert begins(following)
    following.finish()


def test_a_job_that_can_not_be_alone_in_time_is_told_so_and_keeps_nobody_out(monkeypatch):
    monkeypatch.setattr(module, "_OTHERS_MAY_TAKE", 0.05)
    solitude = Solitude()
    long, wanting = object(), object()
    solitude.enter(long)
    solitude.enter(wanting)
    assert not solitude.make_alone(wanting)
    assert solitude.is_open
    solitude.leave(long)
    assert solitude.make_alone(wanting)


def test_a_second_job_that_must_be_alone_does_not_begin_beside_the_first(monkeypatch):
    monkeypatch.setattr(module, "_OTHERS_MAY_TAKE", 0.05)
    solitude = Solitude()
    first, second = object(), object()
    solitude.enter(first)
    assert solitude.make_alone(first)
    assert not solitude.make_alone(second)
    assert not solitude.is_open


def test_who_waits_too_long_for_a_job_alone_exposes_it_before_beginning(monkeypatch):
    monkeypatch.setattr(module, "_ALONE_AT_MOST", 0.05)
    monkeypatch.setattr(module, "_EXPOSE_AGAIN", 0.01)
    answers, asked = [True, False, False], []

    def expose(delivery):
        asked.append((delivery, set(solitude.running)))
        return answers.pop()

    solitude = Solitude(expose)
    alone = object()
    solitude.enter(alone)
    assert solitude.make_alone(alone)
    other = Job(solitude)
    assert begins(other)
    # The store was asked until it had recorded that, and nothing else ran so far.
    assert asked == [(alone, {alone})] * 3
    other.finish()


def test_each_start_that_proved_nothing_gives_the_next_one_twice_the_time(monkeypatch):
    monkeypatch.setattr(module, "_ALONE_AT_MOST", 30)
    now = 1_000.0
    monkeypatch.setattr(module, "monotonic", lambda: now)
    for unproven, seconds in [(0, 30), (1, 60), (3, 240), (5, 600), (10**6, 600)]:
        solitude = Solitude()
        assert solitude.make_alone(object(), unproven)
        assert solitude._until == now + seconds
