"""The Django project of these tests, set up in the process that runs them."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
import unittest
from contextlib import contextmanager
from urllib.parse import urlsplit

import django
from django.apps import apps
from django.conf import settings
from django.core import mail
from django.core.management import call_command
from django.db import connections
from django_dramatiq.middleware import DbConnectionsMiddleware as DbConnectionsMiddleware  # noqa: PLC0414 - for the tests

# Its presence changes the advice in errors, also in other tests of this process.
sys.modules.pop("django_dramatiq", None)

OURS = "dramatiq_policies.contrib.django.tasks.DramatiqBackend"
ENGINES = {"postgresql": "postgresql", "mariadb": "mysql", "sqlite": "sqlite3"}


def set_up():
    """Set Django up, once in a process. The database is a file, which every thread sees."""
    if settings.configured:
        return
    folder, owner = tempfile.mkdtemp(prefix="dp-django-"), os.getpid()
    atexit.register(lambda: shutil.rmtree(folder) if os.getpid() == owner else None)
    settings.configure(
        SECRET_KEY="of a test",
        USE_TZ=True,
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": f"{folder}/default.sqlite3"}},
        INSTALLED_APPS=["dramatiq_policies.contrib.django", "tests.contrib.django.shop"],
        ROOT_URLCONF="tests.contrib.django.shop.urls",
        ALLOWED_HOSTS=["*"],
        TASKS={
            "default": {"BACKEND": OURS, "QUEUES": ["default", "mail", "slow"]},
            "any": {"BACKEND": OURS, "QUEUES": []},
            "immediate": {"BACKEND": "django.tasks.backends.immediate.ImmediateBackend"},
        },
    )
    django.setup()


def make_tables(alias="default"):
    """Make the tables of dramatiq_policies and of the shop, or empty them."""
    call_command("migrate", database=alias, run_syncdb=True, fake_initial=True, verbosity=0)
    for model in apps.get_models():
        model.objects.using(alias).all().delete()


@contextmanager
def database(alias, **changes):
    """Let Django know another database, by an alias of its own."""
    known = {name: dict(values) for name, values in connections.settings.items()}
    connections.settings[alias] = connections.configure_settings({**known, alias: changes})[alias]
    try:
        yield alias
    finally:
        for connection in connections.all(initialized_only=True):
            if connection.alias == alias:
                driver_connection = connection.connection
                connection.close()
                if connection.connection is not None:  # Django never closes a database in memory.
                    driver_connection.close()
                del connections[alias]
        del connections.settings[alias]


def options_of(url):
    """Return the settings for the URL of a database."""
    parts = urlsplit(url)
    engine = f"django.db.backends.{ENGINES[parts.scheme]}"
    if parts.scheme == "sqlite":
        return {"ENGINE": engine, "NAME": url.removeprefix("sqlite:///")}
    if parts.scheme == "mariadb":
        import pymysql

        pymysql.version_info = (2, 2, 7, "final", 0)  # Django asks for a version of mysqlclient.
        pymysql.install_as_MySQLdb()
    return {
        "ENGINE": engine,
        "NAME": parts.path[1:],
        "USER": parts.username or "",
        "PASSWORD": parts.password or "",
        "HOST": parts.hostname,
        "PORT": parts.port,
    }


def run_case(case):
    """Run the tests of a class of Django's, in this process and on this database."""
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    vars(mail).pop("outbox", None)  # Django 4.2 leaves it.
    assert result.testsRun
    for _, trace in (*result.errors, *result.failures):
        raise AssertionError(trace)
