"""Interrupts that others raise in a worker's thread, as dramatiq-abort does, reach async jobs: in the job, or not at all."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from math import inf
from time import monotonic
from typing import ClassVar

import pytest
from dramatiq.asyncio import async_to_sync
from dramatiq.middleware import AsyncIO, Middleware
from dramatiq.threading import Interrupt, raise_thread_exception

from dramatiq_policies.interrupts import coroutines
from dramatiq_policies.interrupts import threads as interrupts

from ..support import Stage

LONG = 3_600


class Abort(Interrupt):
    """Somebody else's."""


class Gone(BaseException):
    """Not even an Interrupt."""


class Noting(Middleware):
    threads: ClassVar[list[int]] = []

    def before_process_message(self, broker, message):
        self.threads.append(threading.get_ident())


def call(fn, *args, deadline=None):
    return coroutines.run(async_to_sync(fn), args, {}, deadline=deadline)


@pytest.mark.parametrize("options", [{}, {"timeout": inf}], ids=["with a timeout", "without one"])
@pytest.mark.parametrize("raised", [Abort, Gone])
def test_an_abort_cancels_an_async_job_and_waits_for_its_clean_up(options, raised):
    stage, steps, waiting = Stage(middleware=[AsyncIO(), Noting()]), [], Noting.threads

    @stage.actor(discard_on=raised, **options)
    async def job():
        steps.append("begun")
        raise_thread_exception(waiting[-1], raised)
        try:
            await asyncio.sleep(LONG)
        finally:
            await asyncio.sleep(0.01)
            steps.append("cleaned up")

    job.send()
    with stage.working():
        stage.collected.wait_for(lambda events: events)
        assert steps[1:] == ["cleaned up"]
    (event,) = stage.events
    assert (event.outcome, type(event.exception)) == ("discarded", raised)


def test_a_job_that_swallows_the_cancellation_has_succeeded(event_loop):
    waiting = threading.get_ident()

    async def job():
        raise_thread_exception(waiting, Abort)
        try:
            await asyncio.sleep(LONG)
        except asyncio.CancelledError:
            return "kept"

    assert call(job) == "kept"


def test_a_second_abort_cancels_the_clean_up(event_loop):
    waiting, steps = threading.get_ident(), []

    async def job():
        raise_thread_exception(waiting, Abort)
        try:
            await asyncio.sleep(LONG)
        except asyncio.CancelledError:
            steps.append("first")
        raise_thread_exception(waiting, Abort)
        try:
            await asyncio.sleep(LONG)
        finally:
            steps.append("second")

    with pytest.raises(Abort):
        call(job)
    assert steps == ["first", "second"]


def test_an_abort_that_comes_when_the_job_has_ended_is_dropped(event_loop):
    waiting = threading.get_ident()

    async def job():
        raise_thread_exception(waiting, Abort)
        return "done"

    # It awaits nothing, so nothing can cancel it.
    for _ in range(200):
        assert call(job) == "done"


def test_an_abort_before_the_job_begins_leaves_it_unbegun(event_loop, monkeypatch):
    waiting, begun, blocked = threading.get_ident(), [], threading.Event()
    interrupt = coroutines._Run.interrupt

    def interrupt_and_unblock(run, exception):
        interrupt(run, exception)
        blocked.set()

    async def job():
        begun.append(True)

    monkeypatch.setattr(coroutines._Run, "interrupt", interrupt_and_unblock)
    event_loop.loop.call_soon_threadsafe(blocked.wait, 20)
    threading.Timer(0.05, raise_thread_exception, (waiting, Abort)).start()
    with pytest.raises(Abort):
        call(job)
    assert begun == []


def test_aborts_at_any_moment_end_each_job_once_and_leave_none_running(event_loop):
    ended, running, counted = threading.Event(), [], Counter()
    waiting, chance = threading.get_ident(), random.Random(3)

    async def job(seconds):
        running.append(1)
        try:
            await asyncio.sleep(seconds)
            return "done"
        finally:
            running.pop()

    #: Holds one token while a job may be aborted: each job is aborted once at most, and only while this thread runs it.
    tokens, inside = [], threading.Lock()

    def abort_now_and_then():
        while not ended.wait(chance.random() / 500):
            with inside:
                if tokens:
                    tokens.clear()
                    raise_thread_exception(waiting, Abort)

    # The slot and the timer's thread are made here, where no abort can strike.
    assert call(job, 0) == "done"
    aborter = threading.Thread(target=abort_now_and_then, daemon=True)
    aborter.start()
    deadline = monotonic() + 60
    try:
        # A busy machine may run the first hundreds before the other thread.
        while (sum(counted.values()) < 300 or not counted["aborted"]) and monotonic() < deadline:
            try:
                try:
                    tokens.append("one abort")
                    result = call(job, chance.random() / 1_000)
                finally:
                    # An abort that strikes here has used up the token. One that the aborter sets meanwhile is raised below.
                    tokens.clear()
                    with inside:
                        pass
                    for _ in range(100):
                        pass
            except Abort:
                result = "aborted"
            except RuntimeError:
                result = "broken"
            assert running == []
            counted[result] += 1
    finally:
        ended.set()
        aborter.join()
    assert counted["done"]
    assert counted["aborted"]
    assert not counted["broken"]


def test_a_sync_job_that_an_abort_ends_closes_the_connections_it_may_have_hit():
    given_up = []

    def job():
        raise_thread_exception(threading.get_ident(), Abort)
        deadline = monotonic() + 20
        while monotonic() < deadline:
            pass

    with pytest.raises(Abort):
        interrupts.run(job, (), {}, deadline=monotonic() + 60, after_interrupt=lambda: given_up.append(1))
    assert given_up == [1]
    with pytest.raises(KeyError):
        interrupts.run({}.__getitem__, (1,), {}, deadline=monotonic() + 60, after_interrupt=lambda: given_up.append(2))
    assert given_up == [1]
    interrupts.reset()
