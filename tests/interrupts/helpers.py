"""Jobs that spin, threads of their own, and a listener for stuck jobs."""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
import textwrap
import threading
import time
from time import monotonic

from dramatiq.asyncio import async_to_sync

from dramatiq_policies.errors import TimeoutExceeded
from dramatiq_policies.interrupts import coroutines


class Watching:
    def __init__(self, grace=0.05):
        self.grace = grace
        self.seen = []
        self.told = threading.Event()

    def stuck(self, job, stack):
        self.seen.append((job, stack))
        self.told.set()


def run_on_threads(number, work):
    """Run ``work(index)`` on separate threads, and return the results. An error of a thread is raised here."""
    with concurrent.futures.ThreadPoolExecutor(number) as pool:
        return [future.result() for future in [pool.submit(work, index) for index in range(number)]]


def spin(until):
    while monotonic() < until:
        pass


def spin_for_ever():
    while True:
        pass


def in_ms(ms):
    return monotonic() + ms / 1_000


def wait_for(condition, seconds=10):
    end = monotonic() + seconds
    while not condition():
        assert monotonic() < end, "it did not happen"
        time.sleep(0.001)


def tail():
    """Run pure Python after a call: a pending exception would be raised here."""
    for _ in range(100):
        pass


def call_async(fn, *args, **limits):
    return coroutines.run(async_to_sync(fn), args, {}, **limits)


def call_until_begun(fn, **limits):
    """Call ``fn`` with a short deadline. On a busy machine the deadline may come before ``fn`` begins: try a longer one."""
    for milliseconds in (10, 100, 1_000, 10_000):
        begun = []

        async def begin(begun=begun):
            begun.append(True)
            return await fn()

        try:
            return call_async(begin, deadline=in_ms(milliseconds), **limits)
        except TimeoutExceeded:
            if begun:
                raise
    raise AssertionError(f"{fn} did not begin")


def run_script(script):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def near_the_deadline(until, result, seen):
    try:
        while monotonic() < until:
            pass
    except BaseException as error:
        seen.append(error)
        raise
    return result
