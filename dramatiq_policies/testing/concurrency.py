"""Stress for a store: a hundred threads, wrong clocks, forked children."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar
from unittest import mock

__all__ = ["THREADS", "clock_wrong_by", "in_a_child", "run_concurrently"]

T = TypeVar("T")

THREADS = 100
#: In seconds.
CHILD_ENDS_WITHIN = 10.0


def run_concurrently(call: Callable[[int], T], threads: int = THREADS) -> list[T]:
    """Call a function in many threads at the same moment, and return the results."""
    barrier = threading.Barrier(threads)

    def begin(number: int) -> T:
        barrier.wait()
        return call(number)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(begin, range(threads)))


@contextmanager
def clock_wrong_by(seconds: int) -> Iterator[None]:
    right = time.time
    wrong = mock.patch.multiple(
        time, time=lambda: right() + seconds, time_ns=lambda: round((right() + seconds) * 1_000_000_000)
    )
    with wrong:
        yield


def in_a_child(work: Callable[[], None]) -> None:
    """Run ``work`` in a forked child, within ten seconds."""
    if not hasattr(os, "fork"):
        return
    with warnings.catch_warnings():
        # Python warns of a fork beside threads, which is the subject here.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + CHILD_ENDS_WITHIN
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError("the store hangs in a forked child")
        time.sleep(0.005)
    assert ended[1] == 0, "the store failed in a forked child"
