"""A broker for the tasks and actors of the project."""

from __future__ import annotations

import importlib
from pathlib import Path

import dramatiq.broker
import pytest
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import AsyncIO
from dramatiq.results import Results
from dramatiq.results.backends import StubBackend

from dramatiq_policies import ErrorClassifier, RetryPolicy, install

from ...support import HAS_DJANGO_TASKS
from . import project

project.set_up()

if not HAS_DJANGO_TASKS:
    # Not skipped: they don't apply. tests/conftest.py says so at the end of each run.
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_tasks*.py")]


def stub_broker(*middleware):
    broker = StubBroker(middleware=[AsyncIO(), *middleware])
    install(broker, error_classifier=ErrorClassifier(unclassified=RetryPolicy(attempts=1)))
    return broker


@pytest.fixture
def set_broker(monkeypatch):
    """Makes a broker Dramatiq's global one, and the tasks known there. Returns their module."""

    def set_broker(broker):
        monkeypatch.setattr(dramatiq.broker, "global_broker", broker)
        tasks = importlib.import_module("tests.contrib.django.shop.tasks")
        tasks.done.clear()
        return tasks

    return set_broker


@pytest.fixture
def results():
    backend = StubBackend()
    backend.results = {}  # Dramatiq's class shares the dictionary among all instances.
    return backend


@pytest.fixture
def broker(results):
    return stub_broker(Results(backend=results, store_results=True))


@pytest.fixture
def tasks(set_broker, broker):
    return set_broker(broker)
