"""No error and no log record shows a password, wherever it was planted."""

from __future__ import annotations

import functools
import inspect
import logging
import traceback
from time import perf_counter

import dramatiq
import pika
import pytest
import redis
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.results.backends import RedisBackend
from redis.sentinel import Sentinel

import dramatiq_policies
from dramatiq_policies import ConfigurationError, install, ops
from dramatiq_policies.common.credentials import learn_passwords, redact, redacted_repr
from dramatiq_policies.common.safe_logger import SafeLogger
from dramatiq_policies.delivery.actor_options import ACTOR_OPTIONS
from dramatiq_policies.middleware.error_classifier import ErrorClassifier
from dramatiq_policies.stores.memory import MemoryStore
from dramatiq_policies.stores.redis import RedisStore
from dramatiq_policies.testing import faults

#: One that nobody has quoted; its pieces are what a URL's parser makes of it.
PASSWORD = "p@ss/w0rd'hunter2"
PIECES = ("p@ss", "w0rd", "hunter2")


class OldClient(redis.Redis):
    """As redis-py before 8 prints itself."""

    def __repr__(self):
        return f"<redis.client.Redis(<Connection(host=localhost,port=6379,db=0,password={PASSWORD})>)>"


def old_client():
    return OldClient(password=PASSWORD)


class Holder:
    """An object of the application's that prints what it holds."""

    def __repr__(self):
        return f"Holder({PASSWORD!r})"

    def method(self, *args):
        raise AssertionError

    def __call__(self, one):
        raise AssertionError


def plants():
    """Values that hold the password, as somebody mixes up the arguments."""
    client = old_client()
    return {
        "url": f"redis://:{PASSWORD}@localhost:1/0",
        "url with a user": f"amqp://user:{PASSWORD}@localhost:1/",
        "webhook": "https://hooks.example.com/services/T0/hunter2",
        "dsn": f"host=db password='{PASSWORD}'",
        "query": "redis://localhost/0?password=p%40ss%2Fw0rd&x=1",
        "client": client,
        "broker": RedisBroker(client=client),
        "store": RedisStore(client=client),
        "object": Holder(),
        "method": Holder().method,
        "method of a client": client.publish,
        "partial": functools.partial(Holder().method, f"redis://:{PASSWORD}@h"),
        "list": [client],
        "tuple": (Holder(), f"redis://:{PASSWORD}@h"),
        "mapping": {"url": f"redis://:{PASSWORD}@h", "password": PASSWORD, "client": client},
        "key": {Holder(): 1},
    }


def assert_tells_nothing(text):
    assert [piece for piece in PIECES if piece in text] == []


CONSTRUCTORS = [
    *(
        getattr(dramatiq_policies, name)
        for name in sorted(dramatiq_policies.__all__)
        if callable(getattr(dramatiq_policies, name)) and name not in ("actor", "current_job", "install")
    ),
    RedisStore,
    RedisStore.from_url,
    MemoryStore,
]


def options():
    """Each argument of each public constructor, each option of an actor, and each argument of install()."""
    for made in CONSTRUCTORS:
        if isinstance(made, type) and issubclass(made, BaseException | str):
            continue
        try:
            parameters = inspect.signature(made).parameters.values()
        except (TypeError, ValueError):
            continue
        for parameter in parameters:
            if parameter.kind is not parameter.VAR_KEYWORD:
                yield pytest.param(made, parameter, id=f"{made.__qualname__}-{parameter.name}")
    for parameter in inspect.signature(install).parameters.values():
        if parameter.name != "broker":
            yield pytest.param(functools.partial(install, StubBroker), parameter, id=f"install-{parameter.name}")
    for name in sorted({*ACTOR_OPTIONS, *ErrorClassifier().actor_options, "timeout", "queue_timeout", "time_limit"}):
        parameter = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
        yield pytest.param("actor", parameter, id=f"actor-{name}")


def use(made, parameter, value):
    if made == "actor":
        dramatiq.actor(lambda one=None: None, actor_name="pay", broker=install(StubBroker()), **{parameter.name: value})
    elif isinstance(made, functools.partial):
        made.func(made.args[0](), **{parameter.name: value})
    elif parameter.kind is parameter.VAR_POSITIONAL:
        made(value)
    else:
        others = [
            p
            for p in inspect.signature(made).parameters.values()
            if p.default is p.empty
            and p.name != parameter.name
            and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        made(**{parameter.name: value}, **{other.name: 1 for other in others})


@pytest.mark.parametrize(("made", "parameter"), list(options()))
def test_no_error_about_an_option_shows_a_password(made, parameter, caplog):
    for value in plants().values():
        try:
            use(made, parameter, value)
        except ConfigurationError as error:
            assert_tells_nothing(f"{error}{error!r}")
            assert_tells_nothing("".join(traceback.format_exception(error)))
        except Exception as error:
            assert_tells_nothing(f"{error}")
    assert_tells_nothing(caplog.text)


@pytest.mark.parametrize("name", ["client", "url", "object", "method", "mapping"])
def test_an_option_that_takes_a_store_a_client_or_a_broker_shows_the_type_alone(name):
    value = plants()[name]
    for made in (
        lambda: dramatiq_policies.Idempotency(store=value),
        lambda: install(StubBroker(), idempotency=value),
        # A client of Redis has an ``incr``, too.
        lambda: dramatiq_policies.Metrics(client=[value] if name == "client" else value),
    ):
        with pytest.raises(ConfigurationError, match=rf"got a ({type(value).__name__}|list)\."):
            made()
    with pytest.raises(ConfigurationError) as raised:
        faults.redeliver(dramatiq.Message("q", "a", (), {}, {}), broker=RedisBroker(client=old_client()))
    assert_tells_nothing(str(raised.value))


def test_a_url_with_a_password_that_is_not_quoted_is_refused_and_not_shown():
    for url in (f"redis://:{PASSWORD}@localhost:6379/0", "redis://:a/b@localhost/0", "redis://u:12/3@localhost/0"):
        with pytest.raises(ConfigurationError, match="percent-encoded") as raised:
            RedisStore.from_url(url)
        assert_tells_nothing("".join(traceback.format_exception(raised.value)))
    with pytest.raises(ConfigurationError, match="got a str"):
        RedisStore.from_url(f"{PASSWORD}")
    RedisStore.from_url("redis://:p%40ss%2Fw0rd@localhost:6379/0")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (f"redis://:{PASSWORD}@db:6379/0 is away", "redis://***@db:6379/0 is away"),
        ("redis://u:p'a\"s@h/0", "redis://***@h/0"),
        ("redis://:my pass w@rd@host:1/0 x", "redis://***@host:1/0 x"),
        ("redis://user:pass word@h/0", "redis://***@h/0"),
        ("redis://:1234/x@h/0", "redis://***@h/0"),
        ("['redis://a:b@h1','redis://c:d@h2']", "['redis://***@h1','redis://***@h2']"),
        ("amqp://u:p@h1;amqp://u:p2@h2", "amqp://***@h1;amqp://***@h2"),
        ("https://key@sentry.io/1", "https://***@sentry.io/1"),
        ("<Connection(host=h,password=hunter2,db=0)>", "<Connection(host=h,password=***,db=0)>"),
        ("{'password': 'hun ter\\'2', 'x': 1}", "{'password': '***', 'x': 1}"),
        ('PASSWORD="a b" API_KEY=x', 'PASSWORD="***" API_KEY=***'),
        ("password: hunter2", "password: ***"),
        ("password=None, username=None", "password=None, username=None"),
        ("KeyError: 'password'", "KeyError: 'password'"),
        ("redis://host:6379/0 mail ada@x.org", "redis://host:6379/0 mail ada@x.org"),
        ("redis://host is away, mail ada@x", "redis://host is away, mail ada@x"),
    ],
)
def test_urls_and_names_are_masked(text, masked):
    assert redact(text) == masked
    assert ops.redact(text) == masked


HOLDS = {
    "redis": lambda: RedisBroker(url="redis://:s%40crete@localhost/0"),
    "rabbitmq": lambda: RabbitmqBroker(url="amqp://u:s%40crete@localhost"),
    "several": lambda: RabbitmqBroker(url=["amqp://u:other1234@h1", "amqp://u:s%40crete@h2"]),
    "credentials": lambda: RabbitmqBroker(host="h", credentials=pika.PlainCredentials("u", "s@crete")),
    "store": lambda: dramatiq_policies.Idempotency(RedisStore.from_url("redis://:s%40crete@h")),
    "results": lambda: dramatiq.results.Results(backend=RedisBackend(url="redis://:s%40crete@h")),
    "sentinel": lambda: Sentinel([("h", 1)], password="s@crete").master_for("x"),
    "sentinels": lambda: Sentinel([("h", 1)], sentinel_kwargs={"password": "s@crete"}).master_for("x"),
    "provider": lambda: redis.Redis(credential_provider=redis.UsernamePasswordCredentialProvider("u", "s@crete")),
}


@pytest.mark.parametrize(
    "text",
    ["shop.errors.MissingCredentials: MAIL_API_KEY is not set", "MissingApiKey: STRIPE_KEY", "NoPassword: for ada"],
)
def test_the_text_of_an_error_about_a_missing_secret_is_shown(text):
    assert redact(text) == text


@pytest.mark.parametrize("text", ["WrongPassword: hunter2", "Password: hunter2", "MissingPassword=hunter2"])
def test_other_names_before_a_colon_are_masked(text):
    assert "hunter2" not in redact(text)


@pytest.mark.parametrize("holder", HOLDS)
def test_the_password_of_a_known_client_is_masked_wherever_it_stands(holder, caplog):
    learn_passwords(HOLDS[holder]())
    SafeLogger("dramatiq_policies.a_test").error(
        "no %s and %s", "s@crete", ValueError("it is s%40crete"), extra={"exception_text": "s@crete"}
    )
    (record,) = caplog.records
    assert record.getMessage() == "no *** and it is ***"
    assert record.exception_text == "***"


def test_install_learns_the_passwords_of_the_broker_and_of_each_store():
    install(RedisBroker(url="redis://:fromthebroker@localhost:1"))
    assert redact("fromthebroker") == "***"
    install(
        StubBroker(),
        idempotency=dramatiq_policies.Idempotency(RedisStore.from_url("redis://:fromthestore@localhost:1")),
    )
    assert redact("fromthestore") == "***"


def test_a_password_that_is_a_short_word_masks_no_other_word():
    learn_passwords(redis.Redis(password="mail"), pika.PlainCredentials("guest", "guest"), redis.Redis(password="a"))
    assert redact("mail of mailer for guest a") == "*** of mailer for guest a"


def test_a_record_with_its_stack_shows_no_password(caplog):
    try:
        raise ConnectionError(f"redis://:{PASSWORD}@h")
    except ConnectionError:
        SafeLogger("dramatiq_policies.a_test").exception("%r failed", Holder())
    (record,) = caplog.records
    assert_tells_nothing(logging.Formatter().format(record))
    assert "%r failed" in record.msg


def test_a_harmless_value_is_described_unchanged():
    for value in (
        None,
        True,
        3,
        2.5,
        "text",
        [1, "a"],
        (1,),
        (),
        {"a": {1}},
        ValueError,
        len,
        test_urls_and_names_are_masked,
    ):
        assert redacted_repr(value) == repr(value)
    assert redacted_repr(10**5_000) == "a int"
    assert redacted_repr(Holder()) == "a Holder"
    assert redacted_repr(Holder().method) == "<method Holder.method>"


@pytest.mark.parametrize(
    "text",
    ["://x:" + "a" * 100_000, "://:" + "@ " * 30_000, "password='" + "\\" * 50_000, "a." * 50_000, "://a:" * 20_000],
)
def test_a_long_text_is_no_way_to_stop_a_worker(text):
    before = perf_counter()
    redact(text)
    assert perf_counter() - before < 5
