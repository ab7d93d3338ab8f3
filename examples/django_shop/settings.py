"""The bundle in django_dramatiq's settings: by dotted path where the defaults will do, by instance where not."""

from __future__ import annotations

import os

from dramatiq_policies import ErrorClassifier, Idempotency, RetryPolicy
from dramatiq_policies.contrib.django import DjangoStore

SECRET_KEY = "an example's, not a secret"  # noqa: S105
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ.get("DATABASE", ":memory:")}}
INSTALLED_APPS = [
    "django_dramatiq",  # first: it makes the broker
    "dramatiq_policies.contrib.django",  # manage.py policies, and the tables of the outbox and the store
    "examples.django_shop",
]
# The only job deletes rows of django_dramatiq's AdminMiddleware, unused here.
DRAMATIQ_IGNORED_MODULES = ["django_dramatiq.tasks"]

BROKER_URL = os.environ.get("BROKER_URL", "stub://")

DRAMATIQ_BROKER = {
    "BROKER": "dramatiq.brokers.redis.RedisBroker"
    if BROKER_URL.startswith("redis")
    else "dramatiq.brokers.stub.StubBroker",
    "OPTIONS": {"url": BROKER_URL} if BROKER_URL.startswith("redis") else {},
    "MIDDLEWARE": [
        "dramatiq.middleware.AgeLimit",
        "dramatiq.middleware.ShutdownNotifications",
        "dramatiq.middleware.Callbacks",
        "dramatiq.middleware.Pipelines",
        # In the place of Retries and TimeLimit, in any order.
        "dramatiq_policies.Timeout",
        ErrorClassifier(
            retry_on={"django.db.utils.OperationalError": 5},
            unclassified=RetryPolicy(attempts=5),
        ),
        # A message that is sent inside of atomic() is a row of the transaction.
        "dramatiq_policies.contrib.django.DjangoOutbox",
        # In the same database, for transactional=True. Without such actors "dramatiq_policies.Idempotency": keys in the broker's Redis.
        Idempotency(DjangoStore()),
        "dramatiq_policies.DiscardLogger",
        "django_dramatiq.middleware.DbConnectionsMiddleware",
    ],
}
