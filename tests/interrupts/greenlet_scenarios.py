"""Scenarios under gevent, in a process of their own: ``python -m gevent.monkey --module`` runs this module."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable

import gevent
import pytest
from dramatiq.asyncio import EventLoopThread, async_to_sync, set_event_loop_thread
from dramatiq.middleware import Shutdown

from dramatiq_policies.delivery.delivery import RUNNING, Delivery, current
from dramatiq_policies.errors import TimeoutExceeded
from dramatiq_policies.interrupts import greenlets, runner_for, shutdown
from dramatiq_policies.interrupts import threads as interrupts

from .helpers import Watching

SCENARIOS: dict[str, Callable[[], None]] = {}


def scenario(function: Callable[[], None]) -> Callable[[], None]:
    SCENARIOS[function.__name__] = function
    return function


def job(seconds=10):
    time.sleep(seconds)
    return "result"


call = runner_for(job)
assert call is not interrupts.run


@scenario
def a_job_is_interrupted_by_the_hub():
    class Message:
        actor_name, message_id = "mail", "id"

    delivery = Delivery(None, Message())
    delivery.stage, delivery.started, delivery.timeout_ms = RUNNING, time.monotonic(), 50.0
    token = current.set(delivery)
    with pytest.raises(TimeoutExceeded) as raised:
        call(job, (), {}, deadline=time.monotonic() + 0.05)
    current.reset(token)
    assert raised.value.actor == "mail"
    assert raised.value.elapsed_ms >= 50
    assert call(job, (0.01,), {}, deadline=time.monotonic() + 10) == "result"


@scenario
def a_stuck_job_is_reported_with_its_stack():
    watching = Watching()

    def swallows():
        try:
            time.sleep(10)
        except TimeoutExceeded:
            watching.told.wait(10)
            return "swallowed"

    assert call(swallows, (), {}, deadline=time.monotonic() + 0.05, stuck_listener=watching, job=1) == "swallowed"
    ((reported, stack),) = watching.seen
    assert reported == 1
    assert "in swallows" in stack


@scenario
def connections_are_closed_after_a_shutdown_s_interrupt():
    closed = []
    limits = {"on_shutdown": True, "after_interrupt": lambda: closed.append(1)}
    call(job, (0,), {}, **limits)
    assert closed == []
    gevent.spawn_later(0.05, shutdown)
    with pytest.raises(Shutdown):
        call(job, (), {}, **limits)
    assert closed == [1]


@scenario
def a_call_without_limits_or_in_a_call_is_the_plain_one():
    assert call(job, (0.01,), {}) == "result"

    def in_a_call():
        return call(job, (0.05,), {}, deadline=time.monotonic() + 0.01)

    assert call(in_a_call, (), {}, deadline=time.monotonic() + 10) == "result"


@scenario
def an_interrupt_hidden_in_a_runtime_error_comes_out_and_any_other_stays_one():
    def hides():
        try:
            job()
        except TimeoutExceeded as interrupt:
            raise RuntimeError("clean-up took too long") from interrupt

    def fails():
        raise RuntimeError("of the job's own")

    for one, error in ((hides, TimeoutExceeded), (fails, RuntimeError)):
        with pytest.raises(error) as raised:
            call(one, (), {}, deadline=time.monotonic() + 0.05)
        assert raised.type is error


@scenario
def the_hub_interrupts_no_job_that_has_just_ended():
    watching = Watching(grace=0.0)
    run = greenlets._Run(time.monotonic() + 10, True, watching, "job")
    run.end()
    run._expire()
    run._report()
    run._throw(TimeoutExceeded)
    time.sleep(0)
    assert watching.seen == []


@scenario
def nothing_is_raised_after_the_call():
    ends, leaks = [], []

    def work(seed):
        dice = random.Random(seed)
        for _ in range(200):
            try:
                try:
                    seconds = dice.uniform(0, 0.003)
                    deadline = time.monotonic() + 0.0015
                    ends.append(call(job, (seconds,), {}, deadline=deadline, on_shutdown=seed % 2 == 0))
                except TimeoutExceeded:
                    ends.append("timeout")
                except Shutdown:
                    ends.append("shutdown")
                time.sleep(0)
                time.sleep(0.0005)
            except BaseException as leak:
                leaks.append(leak)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(20)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        shutdown()
        time.sleep(0.002)
    assert leaks == []
    assert len(ends) == 20 * 200
    assert set(ends) == {"result", "timeout", "shutdown"}


@scenario
def an_async_job_is_cancelled():
    thread = EventLoopThread(logging.getLogger("loop"))
    thread.start(timeout=5)
    set_event_loop_thread(thread)

    async def coroutine(seconds):
        await asyncio.sleep(seconds)
        return "result"

    fn = async_to_sync(coroutine)
    run = runner_for(fn)
    assert run(fn, (0.01,), {}, deadline=time.monotonic() + 10) == "result"
    with pytest.raises(TimeoutExceeded):
        run(fn, (3_600,), {}, deadline=time.monotonic() + 0.05)
    thread.stop()


def main():
    failed = {}
    for name, function in SCENARIOS.items():
        try:
            function()
        except BaseException:
            failed[name] = traceback.format_exc()
    sys.stdout.write(json.dumps(failed))


if __name__ == "__main__":
    main()
