"""The bundle in django_dramatiq's settings: by dotted path where the defaults will do, by instance where not."""

from __future__ import annotations

import os

from dramatiq_policies import ErrorClassifier

SECRET_KEY = "an example's, not a secret"  # noqa: S105
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ.get("DATABASE", ":memory:")}}
INSTALLED_APPS = ["django_dramatiq", "examples.django_shop"]  # django_dramatiq first: it makes the broker

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
        ErrorClassifier(retry_on={"django.db.utils.OperationalError": 5}),
        "dramatiq_policies.DiscardLogger",
        "dramatiq_policies.contrib.django.WarnInsideAtomic",
        "django_dramatiq.middleware.DbConnectionsMiddleware",
    ],
}
