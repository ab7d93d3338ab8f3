from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest

from dramatiq_policies.testing.concurrency import in_a_child, run_concurrently
from dramatiq_policies.transactions.threads import DatabaseThreads, NoAnswer


def soon() -> float:
    return time.monotonic() + 10


@pytest.fixture
def threads():
    made = DatabaseThreads(f"database-{uuid4().hex}", 3)
    yield made
    made.close()


def running(threads):
    return [thread for thread in threading.enumerate() if thread.name == threads.name]


def wait_until_idle(threads):
    """A thread answers first, and is free for the next call a moment later."""
    while threads._idle._value == 0:
        time.sleep(0.001)


def test_no_thread_starts_before_the_first_call_and_one_serves_calls_one_after_the_other(threads):
    assert running(threads) == []
    for number in range(20):
        assert threads.call(lambda call, number=number: number, soon()) == number
        wait_until_idle(threads)
    assert len(running(threads)) == 1


def test_a_hundred_callers_use_no_more_threads_than_the_limit(threads):
    at_once, most, lock = [0], [0], threading.Lock()

    def work(call):
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.001)
        with lock:
            at_once[0] -= 1
        return threading.current_thread().name

    assert set(run_concurrently(lambda _: threads.call(work, soon()))) == {threads.name}
    assert most[0] == 3
    assert len(running(threads)) == 3


def test_an_error_is_the_caller_s_with_its_traceback(threads):
    def fails(call):
        raise ZeroDivisionError("of the work")

    for _ in range(5):
        with pytest.raises(ZeroDivisionError, match="of the work") as caught:
            threads.call(fails, soon())
        assert caught.traceback[-1].name == "fails"
        wait_until_idle(threads)
    assert len(running(threads)) == 1


def test_a_caller_gives_up_in_time_and_ends_the_wait_of_the_driver(threads):
    severed = threading.Event()

    def hangs(call):
        call.severed_by(severed.set)
        assert severed.wait(10)

    began = time.monotonic()
    with pytest.raises(NoAnswer):
        threads.call(hangs, time.monotonic() + 0.05)
    assert time.monotonic() - began < 5
    assert severed.wait(10)
    assert threads.call(lambda call: "free again", soon()) == "free again"


def test_a_connection_that_comes_after_its_caller_has_given_up_is_severed_at_once(threads):
    connecting, severed = threading.Event(), threading.Event()

    def connects_slowly(call):
        connecting.wait(10)
        call.severed_by(severed.set)

    with pytest.raises(NoAnswer):
        threads.call(connects_slowly, time.monotonic() + 0.01)
    assert not severed.is_set()
    connecting.set()
    assert severed.wait(10)


def test_work_whose_caller_has_given_up_does_not_begin():
    threads, release, begun = DatabaseThreads("one", 1), threading.Event(), []
    blocker = threading.Thread(target=lambda: threads.call(lambda call: release.wait(10), soon()))
    blocker.start()
    try:
        with pytest.raises(NoAnswer):
            threads.call(lambda call: begun.append("late"), time.monotonic() + 0.05)
    finally:
        release.set()
        blocker.join()
    threads.call(lambda call: begun.append("next"), soon())
    threads.close()
    assert begun == ["next"]


def test_a_forked_child_has_threads_of_its_own(threads):
    assert threads.call(lambda call: 1, soon()) == 1

    def in_child():
        assert running(threads) == []
        assert threads.call(lambda call: 2, soon()) == 2

    in_a_child(in_child)
    assert threads.call(lambda call: 3, soon()) == 3


def test_the_threads_end_with_their_owner():
    def use():
        threads, both = DatabaseThreads("owned", 2), threading.Barrier(2)
        with ThreadPoolExecutor(2) as callers:
            assert sorted(callers.map(lambda _: threads.call(lambda call: both.wait(10), soon()), range(2))) == [0, 1]
        return running(threads)

    mine = use()
    assert len(mine) == 2
    gc.collect()
    for thread in mine:
        thread.join(10)
        assert not thread.is_alive()
