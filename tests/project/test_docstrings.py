"""Public names teach by an example, and the examples run."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from smtplib import SMTPException
from types import SimpleNamespace
from unittest import TestCase, mock

import dramatiq
import pytest
import sentry_sdk
import sqlalchemy
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from sqlalchemy.orm import DeclarativeBase, Session, mapped_column
from sqlalchemy.pool import StaticPool

import dramatiq_policies
from dramatiq_policies import errors, sql, testing
from dramatiq_policies.middleware.metrics import Nowhere
from dramatiq_policies.stores.memory import MemoryStore
from dramatiq_policies.stores.redis import RedisStore

PACKAGE = Path(dramatiq_policies.__file__).parent

PUBLIC = {
    name: value
    for module in (dramatiq_policies, testing, sql)
    for name in module.__all__
    if inspect.isclass(value := getattr(module, name)) or inspect.isfunction(value)
} | {"MemoryStore": MemoryStore, "RedisStore": RedisStore, "RedisStore.from_url": RedisStore.from_url}
#: Dramatiq's own function, and names never written by users: errors raised for them, and base classes.
WITHOUT_EXAMPLE = {"actor", "TooManyRuns", *errors.__all__} - {"Discard", "Snooze", "TimeoutExceeded"}
TAUGHT = {name: value for name, value in PUBLIC.items() if name not in WITHOUT_EXAMPLE}


def examples_of(value):
    """The code blocks of a docstring: the indented lines after a line that ends with two colons."""
    text = inspect.getdoc(value)
    found = re.findall(r"::\n\n((?:(?:    .*)?\n?)+)", f"{text}\n")
    codes = [textwrap.dedent(code).strip() for code in found]
    assert all(codes), f"after its two colons, the code is not indented: {text}"
    return codes


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id = mapped_column(sqlalchemy.Integer, primary_key=True)
    is_refunded = True


class HTTPError(OSError):
    response = SimpleNamespace(status_code=429, headers={})


class EmailTimeout(Exception):
    pass


@pytest.fixture
def names():
    """Return the names used and not defined by the examples: an application's."""
    with mock.patch("dramatiq.broker.global_broker", None):
        broker, gateway = StubBroker(), SimpleNamespace(charges=[])
        dramatiq.set_broker(broker)
        found = {**PUBLIC, "actor": dramatiq.actor, "broker": broker, "dramatiq": dramatiq, "RedisBroker": RedisBroker}
        found |= {"HTTPError": HTTPError, "EmailTimeout": EmailTimeout, "SMTPException": SMTPException, "DSN": ""}
        found |= {"timedelta": timedelta, "Session": Session, "sentry_sdk": sentry_sdk, "TransactionTestCase": TestCase}
        found |= {name: mock.MagicMock(name=name) for name in ("payments", "pages", "bank", "render")}
        found |= {"outbox": [], "gateway": gateway, "remove_parts": print, "report_id": 7, "outcomes": mock.MagicMock()}
        found |= {"statsd": SimpleNamespace(StatsClient=lambda *_: Nowhere()), "event": mock.MagicMock()}
        engine = sqlalchemy.create_engine("sqlite://", poolclass=StaticPool)
        Base.metadata.create_all(engine)
        sql.create_tables(engine)
        found |= {"engine": engine, "create_engine": lambda _: engine, "order": Order(), "pytest": pytest}
        found["send_confirmation"] = dramatiq.Actor(
            print, broker=StubBroker(), actor_name="confirm", queue_name="x", priority=0, options={}
        )
        yield found
        engine.dispose()


def declare_jobs(names):
    """The application that the examples of a job and of a test are about."""
    broker, gateway, outbox = names["broker"], names["gateway"], names["outbox"]
    dramatiq_policies.install(broker)

    @dramatiq.actor(
        queue_name="mail",
        retry_on={EmailTimeout: dramatiq_policies.RetryPolicy(wait=dramatiq_policies.exponential(2_000, jitter=0))},
        discard_on=KeyError,
        idempotent=True,
        timeout=30_000,
        tags={"team": "orders"},
    )
    def send_confirmation(order_id, email):
        """Confirm an order."""
        if order_id == 404:
            raise KeyError(order_id)
        if email not in outbox:
            outbox.append(email)

    @dramatiq.actor(idempotency_key="charge:{order_id}")
    def charge(order_id, amount=100):
        if order_id not in gateway.charges:
            gateway.charges.append(order_id)

    names |= {"send_confirmation": send_confirmation, "charge": charge, "stub_broker": broker}


@pytest.mark.parametrize("name", sorted(TAUGHT))
def test_a_public_name_has_an_example(name):
    assert examples_of(TAUGHT[name]), f"{name} has no example"


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_the_code_in_a_docstring_is_indented(file):
    """Otherwise it reads as prose: the formatter takes away the indentation of a block that no line of text precedes or follows."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        lines = (ast.get_docstring(node) or "").splitlines()
        for number, line in enumerate(lines):
            if line.endswith("::"):
                code = next((one for one in lines[number + 1 :] if one), "")
                assert indentation(code) > indentation(line), line


def indentation(line):
    return len(line) - len(line.lstrip())


EXAMPLES = [
    pytest.param(code, id=f"{name}-{number}")
    for name, value in sorted(TAUGHT.items())
    for number, code in enumerate(examples_of(value))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_an_example_runs(code, names):
    compiled = compile(code, "example", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if compiled.co_flags & inspect.CO_COROUTINE:
        return  # Requires a loop and a server: its guide runs the example.
    if "install(" not in code:
        declare_jobs(names)
    with suppress(dramatiq_policies.Verdict, dramatiq_policies.NoCurrentJob):
        exec(compiled, names)
    for name, value in list(names.items()):
        if name.startswith("test_") and callable(value):
            value(*([names["stub_broker"]] if inspect.signature(value).parameters else []))
