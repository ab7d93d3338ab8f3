"""Settings for Django's own tests of task backends, with ours in the place of Django's two; see scripts/django_suite.py."""

from __future__ import annotations

import dramatiq
from django.tasks.backends import dummy, immediate
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import AsyncIO
from dramatiq.results import Results
from dramatiq.results.backends import StubBackend

from dramatiq_policies import ErrorClassifier, RetryPolicy, install

broker = StubBroker(middleware=[AsyncIO(), Results(backend=StubBackend(), store_results=True)])
# Django's backends run a task once.
install(broker, error_classifier=ErrorClassifier(unclassified=RetryPolicy(attempts=1)))
dramatiq.set_broker(broker)

from suite_backends import QueueingBackend, RunningBackend  # noqa: E402 - declares its tasks on the broker

dummy.DummyBackend = QueueingBackend
immediate.ImmediateBackend = RunningBackend

SECRET_KEY = "of a test"
USE_TZ = False  # as in Django's own settings for tests
DATABASES = {name: {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"} for name in ("default", "other")}
TASKS = {"default": {"BACKEND": "django.tasks.backends.immediate.ImmediateBackend"}}
TEST_RUNNER = "suite_runner.Runner"
