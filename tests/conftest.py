"""The kit's own plugin, also where the package is on the path and not installed."""

from __future__ import annotations

import gc
import itertools
import sys
from pathlib import Path

import dramatiq.worker
import pytest
from dramatiq.broker import MessageProxy
from hypothesis import settings

from dramatiq_policies.common import credentials
from dramatiq_policies.testing import pytest_plugin

from .support import HAS_DJANGO_TASKS

# No example fails for its time: on a busy machine any of them may take long.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

WITH_SERVERS = [Path(__file__).parent / folder for folder in ("integration", "chaos")]

if not hasattr(dramatiq.worker, "_WorkQueueItem"):
    # Before Dramatiq 2.2 a worker takes messages of one priority in the random order of their ids. The tests expect the order
    # of arrival, as in 2.2.
    arrivals = itertools.count()
    make = MessageProxy.__init__

    def number_it(proxy, message):
        make(proxy, message)
        proxy.arrival = next(arrivals)

    MessageProxy.__init__ = number_it
    MessageProxy.__lt__ = lambda proxy, other: proxy.arrival < other.arrival


def pytest_configure(config):
    if not config.pluginmanager.is_registered(pytest_plugin):
        config.pluginmanager.register(pytest_plugin, "dramatiq_policies")


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    """Collect without the garbage collector, and have it pass over all modules afterwards: each search took 0.2 s of CPU."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_ignore_collect(collection_path, config):
    """Do not import the tests with real servers where ``-m`` leaves them out: their imports cost each process a second."""
    if config.option.markexpr == "not integration" and collection_path in WITH_SERVERS:
        return True
    return None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Deal the tests with real servers to the processes of xdist, before the other tests.

    `--dist worksteal` gives each process a contiguous part of the tests, and a process never gives away its next test. Tests that
    wait for servers take up to 30 s: at the end of a run, all other processes would wait for the last of them.
    """
    processes = getattr(config, "workerinput", {}).get("workercount")
    if processes is None:
        return
    slow = [item for item in items if "integration" in item.keywords]
    fast = [item for item in items if "integration" not in item.keywords]
    items[:] = [
        item
        for number in range(processes)
        for item in (
            *slow[number::processes],
            *fast[len(fast) * number // processes : len(fast) * (number + 1) // processes],
        )
    ]


def pytest_terminal_summary(terminalreporter):
    if not HAS_DJANGO_TASKS:
        terminalreporter.write_line(
            "Not applicable here, and not run: tests/contrib/django/test_tasks*.py and tests/integration/test_django_tasks.py, "
            "which need Django 6 (Python 3.12)."
        )


@pytest.fixture(autouse=True)
def run_concurrently(monkeypatch):
    """No job waits for the boot of the next worker: a test has no command to boot workers."""
    monkeypatch.setattr("dramatiq_policies.middleware.idempotency._BOOTING", 0)


@pytest.fixture(autouse=True)
def no_known_passwords(monkeypatch):
    """Forget the known passwords of a test: words of the next test stay unmasked."""
    monkeypatch.setattr(credentials, "_known", frozenset())
    monkeypatch.setattr(credentials, "_pattern", None)


@pytest.fixture(autouse=True)
def connections_of_engines_are_closed():
    """Close the connections left in the pools of a test's engines: drivers warn of an open connection when its pool is collected."""
    if "sqlalchemy" not in sys.modules:
        yield
        return
    from sqlalchemy import Engine, event

    engines = set()

    def note(connection):
        # Only the event loop that opened the connections of an async engine could close them.
        if not connection.dialect.is_async:
            engines.add(connection.engine)

    event.listen(Engine, "engine_connect", note)
    yield
    event.remove(Engine, "engine_connect", note)
    for engine in engines:
        engine.dispose()
