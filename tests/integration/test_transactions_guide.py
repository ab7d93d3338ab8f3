"""docs/transactions.md, followed by copy and paste in an empty folder, on PostgreSQL and Redis."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

import dramatiq_policies

from .databases import own_database
from .places import until

PACKAGE = Path(dramatiq_policies.__file__).parents[1]
PAGE = (PACKAGE / "docs" / "transactions.md").read_text()
BLOCKS = [text for _, text in re.findall(r"^```(py|python)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)]
SQLALCHEMY, FASTAPI = (block for block in BLOCKS if block.startswith("# shop.py"))
(DJANGO,) = (block for block in BLOCKS if block.startswith("# settings.py"))
(DJANGO_TESTS,) = (block for block in BLOCKS if block.startswith("# shop/tests.py"))
#: A reader's own Django project.
SETTINGS = """
SECRET_KEY = "of a test"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {{"default": {{"ENGINE": "django.db.backends.postgresql", "NAME": {database!r}, "HOST": {host!r}, "PORT": {port}, "USER": {user!r}, "PASSWORD": {password!r}}}}}
"""
MODELS = """
from django.db import models

class Order(models.Model):
    total = models.IntegerField()

class Payment(models.Model):
    order_id = models.IntegerField()
"""


@pytest.fixture
def database(postgresql_url: str) -> Iterator[str]:
    """The page creates tables, so a database without any."""
    with own_database(postgresql_url) as url:
        yield url


@pytest.fixture
def adapted(database, redis_url, redis_namespace):
    """The reader's names of servers. The Redis is shared, so the broker has a namespace of its own."""

    def adapt(text: str) -> str:
        servers = {
            "postgresql+psycopg://localhost/shop": database.replace("://", "+psycopg://"),
            "postgresql+asyncpg://localhost/shop": database.replace("://", "+asyncpg://"),
            'RedisBroker(url="redis://localhost:6379/0")': f'RedisBroker(url="{redis_url}", namespace="{redis_namespace}")',
            '{"url": "redis://localhost:6379/0"}': f'{{"url": "{redis_url}", "namespace": "{redis_namespace}"}}',
        }
        for written, here in servers.items():
            text = text.replace(written, here)
        assert "localhost/shop" not in text
        return text

    return adapt


@pytest.fixture
def environment(tmp_path):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": f"{PACKAGE}:{tmp_path}"}


def run(line, tmp_path, environment):
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@contextmanager
def working(line, tmp_path, environment) -> Iterator[Path]:
    log = tmp_path / "log"
    with log.open("wb") as stream:
        worker = subprocess.Popen(
            line, cwd=tmp_path, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        yield log
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait(30)


def until_charged(database, log, *, table="payments"):
    """The payment is in the table, the receipt in the worker's log, and nothing in the outbox."""
    until(lambda: "receipt for order 1" in log.read_text(), timeout=60, describe=log.read_text)
    with psycopg.connect(database) as connection:
        assert connection.execute(f"SELECT order_id FROM {table}").fetchall() == [(1,)]
        assert connection.execute("SELECT count(*) FROM dramatiq_policies_outbox").fetchall() == [(0,)]


def test_the_first_example_charges_an_order(database, adapted, tmp_path, environment):
    (tmp_path / "shop.py").write_text(adapted(SQLALCHEMY))
    run([sys.executable, "-c", "import shop; shop.place_order(12)"], tmp_path, environment)
    with working(["dramatiq", "shop", "--processes=1"], tmp_path, environment) as log:
        until_charged(database, log)


def test_the_fastapi_example_charges_an_order(database, adapted, tmp_path, environment):
    pytest.importorskip("fastapi")
    imports, _, rest = SQLALCHEMY.partition("engine = ")
    tables = rest[rest.index("class Base") : rest.index('@dramatiq.actor(idempotency_key="charge')]
    shop = FASTAPI.replace("# Base, Order, Payment and send_receipt: as in the first example\n", tables)
    assert shop != FASTAPI
    (tmp_path / "shop.py").write_text(adapted(imports + shop))
    make_tables = (
        "import asyncio, shop\n"
        "shop.create_tables(shop.engine)\n"
        "async def make():\n"
        "    async with shop.engine.begin() as connection:\n"
        "        await connection.run_sync(shop.Base.metadata.create_all)\n"
        "asyncio.run(make())\n"
    )
    run([sys.executable, "-c", make_tables], tmp_path, environment)
    request = (
        "import shop; from fastapi.testclient import TestClient\n"
        "print(TestClient(shop.app).post('/orders', params={'total': 12}).json())"
    )
    assert "{'order': 1}" in run([sys.executable, "-c", request], tmp_path, environment)
    with working(["dramatiq", "shop", "--processes=1"], tmp_path, environment) as log:
        until_charged(database, log)


def test_the_django_example_charges_an_order_and_its_tests_pass(database, adapted, tmp_path, environment):
    pytest.importorskip("django_dramatiq")
    settings, tasks, checkout = (
        text for text in re.split(r"^# (?:settings|shop/\w+)\.py\n", DJANGO, flags=re.MULTILINE) if text
    )
    info = psycopg.conninfo.conninfo_to_dict(database)
    place = {
        "database": info["dbname"],
        "host": info["host"],
        "port": int(info.get("port", 5432)),
        "user": info.get("user", ""),
        "password": info.get("password", ""),
    }
    shop = tmp_path / "shop"
    shop.mkdir()
    (shop / "__init__.py").touch()
    (shop / "models.py").write_text(MODELS)
    (shop / "tasks.py").write_text(tasks)
    (shop / "checkout.py").write_text(checkout)
    (shop / "tests.py").write_text(DJANGO_TESTS)
    (tmp_path / "settings.py").write_text(SETTINGS.format(**place) + adapted(settings))
    (tmp_path / "test_settings.py").write_text(
        "from settings import *\n"
        'DRAMATIQ_BROKER = {**DRAMATIQ_BROKER, "BROKER": "dramatiq.brokers.stub.StubBroker", "OPTIONS": {}}\n'
    )
    environment["DJANGO_SETTINGS_MODULE"] = "settings"
    manage = [sys.executable, "-m", "django"]
    run([*manage, "makemigrations", "shop"], tmp_path, environment)
    run([*manage, "migrate"], tmp_path, environment)
    order = "import django; django.setup(); from shop.checkout import place_order; place_order(12)"
    run([sys.executable, "-c", order], tmp_path, environment)
    with working([*manage, "rundramatiq", "--processes=1"], tmp_path, environment) as log:
        until_charged(database, log, table="shop_payment")
    shown = run([*manage, "test", "shop", "--settings=test_settings"], tmp_path, environment)
    assert "\nOK" in shown
