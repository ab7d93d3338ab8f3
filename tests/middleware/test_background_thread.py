"""A middleware's thread runs while the process has workers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from dramatiq_policies.middleware.background_thread import BackgroundThread

PATIENCE = 10


class Running:
    """Runs until it is told to stop, and notes the threads that ran it."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self.stops: list[threading.Event] = []
        self.ended = threading.Semaphore(0)

    def __call__(self, stop: threading.Event) -> None:
        self.threads.append(threading.current_thread())
        self.stops.append(stop)
        stop.wait(PATIENCE)
        self.ended.release()


@pytest.fixture
def running() -> Running:
    return Running()


@pytest.fixture
def thread(running: Running) -> BackgroundThread:
    return BackgroundThread("example", running)


def started(running: Running, count: int = 1) -> None:
    deadline = threading.Event()
    for _ in range(PATIENCE * 100):
        if len(running.threads) == count:
            return
        deadline.wait(0.01)
    pytest.fail(f"{len(running.threads)} threads, and not {count}")


def test_nothing_starts_at_construction(thread: BackgroundThread, running: Running) -> None:
    assert not any(one.name == "dramatiq-policies-example" for one in threading.enumerate())
    thread.join(PATIENCE)
    assert running.threads == []


def test_a_background_thread_runs_from_the_first_worker_to_the_last(thread: BackgroundThread, running: Running) -> None:
    one: Any = "one worker"
    other: Any = "another worker"
    assert [thread.add_worker(one), thread.add_worker(other)] == [True, False]
    started(running)
    assert (running.threads[0].name, running.threads[0].daemon) == ("dramatiq-policies-example", True)
    thread.remove_worker(one)
    thread.join(0.0)
    assert not running.stops[0].is_set()
    assert thread.workers == [other]
    thread.remove_worker(other)
    assert running.stops[0].is_set()
    thread.join(PATIENCE)
    assert not running.threads[0].is_alive()


def test_a_worker_after_the_last_starts_another_thread_with_a_stop_of_its_own(
    thread: BackgroundThread, running: Running
) -> None:
    worker: Any = "a worker"
    assert thread.add_worker(worker)
    started(running)
    thread.remove_worker(worker)
    assert thread.add_worker(worker)
    started(running, 2)
    assert [stop.is_set() for stop in running.stops] == [True, False]
    thread.remove_worker(worker)
    thread.join(PATIENCE)
    assert running.ended.acquire(timeout=PATIENCE)
    assert running.ended.acquire(timeout=PATIENCE)


def test_a_worker_that_never_booted_is_no_error(thread: BackgroundThread) -> None:
    unknown: Any = "a worker that never booted"
    thread.remove_worker(unknown)
    thread.join(PATIENCE)
    assert thread.workers == []


def test_joining_does_not_wait_longer_than_asked(running: Running) -> None:
    go_on = threading.Event()
    hangs: Callable[[threading.Event], object] = lambda stop: go_on.wait(PATIENCE)  # noqa: E731
    thread = BackgroundThread("example", hangs)
    worker: Any = "a worker"
    thread.add_worker(worker)
    thread.remove_worker(worker)
    thread.join(0.01)
    assert thread.add_worker(worker)
    thread.remove_worker(worker)
    go_on.set()
    thread.join(PATIENCE)
