"""Real servers for the tests in this folder, at REDIS_URL, RABBITMQ_URL, POSTGRESQL_URL and MARIADB_URL, shared with whoever else
uses them.

Every test works under names of its own and deletes those, and nothing else. Without a server a test fails.
"""

from __future__ import annotations

import gc
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pika
import pytest
import redis
import sqlalchemy as sa
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker

from ..support import HAS_DJANGO_TASKS
from .databases import make_empty_tables, own_database, with_driver
from .places import Place, RabbitmqPlace, RedisPlace

HERE = Path(__file__).parent
collect_ignore = [] if HAS_DJANGO_TASKS else ["test_django_tasks.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.integration)
            # Clients leave sockets of connections that were cut under them to the garbage collector.
            item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))
            callspec = getattr(item, "callspec", None)
            for server in ("redis", "rabbitmq", "postgresql", "mariadb"):
                on_it = callspec is not None and server in (
                    callspec.params.get("place"),
                    callspec.params.get("database_url"),
                    callspec.params.get("server_url"),
                )
                if on_it or f"{server}_url" in getattr(item, "fixturenames", ()):
                    item.add_marker(server)


def url_from_environment(name: str) -> str:
    url = os.environ.get(name)
    if not url:
        pytest.fail(f"{name} is not set: run this through `make test`, or set it to a server for tests.", pytrace=False)
    return url


@pytest.fixture(autouse=True, scope="module")
def what_is_left_to_the_garbage_collector() -> Iterator[None]:
    """Is collected here, where it is ignored; else it fails a test of somebody else's, or the whole run at its end."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def redis_url() -> str:
    return url_from_environment("REDIS_URL")


@pytest.fixture(scope="session")
def rabbitmq_url() -> str:
    return url_from_environment("RABBITMQ_URL")


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """A database that this process alone uses, dropped at its end; without a driver: see `with_driver` in `databases.py`."""
    with own_database(url_from_environment("POSTGRESQL_URL")) as url:
        yield url


@pytest.fixture(scope="session")
def mariadb_url() -> Iterator[str]:
    """As `postgresql_url`."""
    with own_database(url_from_environment("MARIADB_URL")) as url:
        yield url


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/database.sqlite3"


@pytest.fixture(params=["postgresql", "mariadb", "sqlite"])
def database_url(request: pytest.FixtureRequest) -> str:
    """One database of each kind in turn, with the tables of dramatiq_policies, which are empty."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    make_empty_tables(url)
    return url


@pytest.fixture(params=["postgresql", "mariadb"])
def server_url(request: pytest.FixtureRequest) -> str:
    """`database_url` on the servers, without SQLite."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    make_empty_tables(url)
    return url


@pytest.fixture
def database_engine(database_url: str) -> Iterator[sa.Engine]:
    """A sync engine of `database_url`."""
    engine = sa.create_engine(with_driver(database_url))
    yield engine
    engine.dispose()


@pytest.fixture
def redis_client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def redis_namespace(redis_client: redis.Redis) -> Iterator[str]:
    """A namespace nobody else uses; its keys, `<namespace>:*`, are deleted after the test."""
    namespace = f"dp-test-{uuid.uuid4().hex}"
    yield namespace
    keys = list(redis_client.scan_iter(match=f"{namespace}:*", count=5_000))
    if keys:
        redis_client.delete(*keys)


@pytest.fixture
def unique_queue() -> Iterator[str]:
    """A queue name nobody else uses; on RabbitMQ it is deleted after the test, with its .DQ and .XQ."""
    queue = f"dp-test-{uuid.uuid4().hex}"
    yield queue
    url = os.environ.get("RABBITMQ_URL")
    if url:
        with pika.BlockingConnection(pika.URLParameters(url)) as connection, connection.channel() as channel:
            for name in (queue, f"{queue}.DQ", f"{queue}.XQ"):
                channel.queue_delete(name)


@pytest.fixture
def redis_broker(redis_url: str, redis_namespace: str) -> Iterator[RedisBroker]:
    """Dramatiq's own broker as its users make it, without dramatiq_policies."""
    broker = RedisBroker(url=redis_url, namespace=redis_namespace)
    yield broker
    broker.close()


@pytest.fixture
def rabbitmq_broker(rabbitmq_url: str, unique_queue: str) -> Iterator[RabbitmqBroker]:
    """Dramatiq's own broker as its users make it, without dramatiq_policies. Only `unique_queue` is cleaned up after it."""
    broker = RabbitmqBroker(url=rabbitmq_url)
    yield broker
    broker.close()


@pytest.fixture
def quick_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dramatiq waits for 3 s after a lost connection; a test need not."""
    monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.1)
    monkeypatch.setattr("dramatiq.worker.POST_PROCESS_MESSAGE_RETRY_DELAY_SECS", 0.1)


@pytest.fixture
def redis_place(
    redis_url: str, unique_queue: str, redis_namespace: str, redis_client: redis.Redis
) -> Iterator[RedisPlace]:
    place = RedisPlace(redis_url, unique_queue, redis_namespace, redis_client)
    yield place
    place.close()


@pytest.fixture
def rabbitmq_place(rabbitmq_url: str, unique_queue: str) -> Iterator[RabbitmqPlace]:
    place = RabbitmqPlace(rabbitmq_url, unique_queue)
    yield place
    place.close()


@pytest.fixture(params=["redis", "rabbitmq"])
def place(request: pytest.FixtureRequest) -> Place:
    """One queue on each server in turn."""
    found: Place = request.getfixturevalue(f"{request.param}_place")
    return found
