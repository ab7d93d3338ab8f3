"""Interrupts of coroutine functions: the loop cancels the task."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import threading
import types

import pytest
from dramatiq.asyncio import async_to_sync
from dramatiq.middleware import Shutdown

from dramatiq_policies.delivery.current_job import current_job
from dramatiq_policies.errors import TimeoutExceeded
from dramatiq_policies.interrupts import coroutines, runner_for, shutdown
from dramatiq_policies.interrupts import threads as interrupts

from .helpers import (
    Watching,
    call_async,
    call_until_begun,
    in_ms,
    spin,
)

# An interrupt may land in a callback of the garbage collector, which some library has set and can't raise: the job then
# goes on, as the interpreter says on stderr.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


async def sleep_for_ever():
    await asyncio.sleep(3_600)


def test_dramatiq_s_wrapper_of_a_coroutine_function_is_known():
    assert coroutines.is_async(async_to_sync(sleep_for_ever))
    assert not coroutines.is_async(sleep_for_ever)
    assert not coroutines.is_async(spin)
    assert runner_for(async_to_sync(sleep_for_ever)) is coroutines.run
    assert runner_for(spin) is interrupts.run


def test_an_async_job_returns_its_result(event_loop):
    async def job(a, b):
        await asyncio.sleep(0)
        return a + b

    assert call_async(job, 1, 2) == 3
    assert call_async(job, 1, 2, deadline=in_ms(60_000)) == 3


def test_an_async_job_is_cancelled_where_it_awaits_and_its_connections_are_kept(event_loop):
    given_up = []
    with pytest.raises(TimeoutExceeded):
        call_until_begun(sleep_for_ever, after_interrupt=lambda: given_up.append(1))
    assert given_up == []


def test_without_an_event_loop_the_error_is_dramatiq_s():
    with pytest.raises(RuntimeError, match="Have you added the AsyncIO middleware"):
        call_async(sleep_for_ever, deadline=in_ms(60_000))


def test_an_async_job_is_cancelled_at_its_deadline_and_cleans_up(event_loop, delivery):
    cleaned = []

    async def job():
        try:
            await asyncio.sleep(3_600)
        finally:
            await asyncio.sleep(0.05)
            cleaned.append(threading.current_thread())

    with pytest.raises(TimeoutExceeded) as caught:
        call_until_begun(job)
    assert cleaned == [event_loop]
    assert caught.value.actor == "mail"
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)


def test_clean_up_that_takes_long_is_still_a_timeout(event_loop):
    async def job():
        try:
            await asyncio.sleep(3_600)
        finally:
            await asyncio.sleep(1.2)  # Dramatiq waits for one second.

    with pytest.raises(TimeoutExceeded):
        call_until_begun(job)


def test_a_coroutine_that_swallows_its_cancellation_has_succeeded(event_loop):
    async def job():
        try:
            await asyncio.sleep(3_600)
        except asyncio.CancelledError:
            return "cleaned up"

    assert call_until_begun(job) == "cleaned up"


def test_an_error_of_the_clean_up_is_the_job_s_error(event_loop):
    async def job():
        try:
            await asyncio.sleep(3_600)
        finally:
            raise KeyError("clean-up")

    with pytest.raises(KeyError):
        call_until_begun(job)


def test_errors_of_the_job_s_own_are_not_taken_for_ours(event_loop):
    async def times_out():
        await asyncio.wait_for(asyncio.sleep(10), 0.001)

    async def is_cancelled():
        asyncio.current_task().cancel()
        await asyncio.sleep(10)

    async def exits():
        raise SystemExit(3)

    with pytest.raises(asyncio.TimeoutError):
        call_async(times_out, deadline=in_ms(60_000))
    with pytest.raises(concurrent.futures.CancelledError):
        call_async(is_cancelled, deadline=in_ms(60_000))
    with pytest.raises(SystemExit):
        call_async(exits, deadline=in_ms(60_000))
    assert event_loop.loop.is_running()


def test_an_async_job_is_notified_of_a_shutdown(event_loop):
    threading.Timer(0.05, shutdown).start()
    with pytest.raises(Shutdown):
        call_async(sleep_for_ever, on_shutdown=True)


def test_a_coroutine_that_is_interrupted_before_it_began_does_not_begin(event_loop):
    begun = []

    async def job():
        begun.append(True)

    blocked = threading.Event()
    event_loop.loop.call_soon_threadsafe(blocked.wait, 10)
    threading.Timer(0.1, blocked.set).start()
    with pytest.raises(TimeoutExceeded):
        call_async(job, deadline=in_ms(10))
    assert begun == []


def test_context_variables_reach_the_coroutine(event_loop, delivery):
    variable = contextvars.ContextVar("variable")
    variable.set("mine")

    async def job():
        return variable.get(), current_job().message_id

    assert call_async(job, deadline=in_ms(60_000)) == ("mine", "id")


def test_a_stuck_coroutine_is_reported_with_its_own_stack(event_loop):
    async def waits_on():
        try:
            await asyncio.sleep(3_600)
        except asyncio.CancelledError:
            await cleans_up()

    async def cleans_up():
        while not watching.told.is_set():  # noqa: ASYNC110 - another thread sets the event
            await asyncio.sleep(0.01)

    for grace in (0.05, 0.5, 5):  # On a busy machine the report may come before the clean-up begins.
        watching = Watching(grace)
        call_until_begun(waits_on, stuck_listener=watching, job="job")
        ((job, stack),) = watching.seen
        if "in cleans_up\n" in stack:
            break
    assert job == "job"
    assert "in waits_on\n" in stack
    assert "in cleans_up\n" in stack


def test_a_coroutine_that_blocks_the_loop_is_reported_with_the_loop_s_stack(event_loop):
    watching = Watching()

    async def blocks():
        watching.told.wait(10)

    call_until_begun(blocks, stuck_listener=watching)
    ((_, stack),) = watching.seen
    assert "in run_forever\n" in stack
    assert "in blocks\n" in stack


@types.coroutine
def never():
    yield


def test_a_coroutine_that_is_thrown_away_with_its_loop_ends_with_an_error():
    async def job():
        await never()

    run = coroutines._Run(None, job())
    on_the_loop = run._main()
    on_the_loop.send(None)
    on_the_loop.close()
    with pytest.raises(RuntimeError, match="Event loop is not running"):
        run.wait()


def test_an_interrupt_that_finds_the_loop_closed_is_dropped():
    loop = asyncio.new_event_loop()
    loop.close()
    coroutine = sleep_for_ever()
    coroutines._Run(types.SimpleNamespace(loop=loop), coroutine).interrupt(TimeoutExceeded)
    coroutine.close()
