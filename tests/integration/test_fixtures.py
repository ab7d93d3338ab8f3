"""The promises of tests/integration/conftest.py: unique names, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pika
import pika.exceptions
import pytest
import redis
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker


@pytest.fixture
def afterwards(redis_client: redis.Redis) -> Iterator[list[Callable[[], object]]]:
    """Checks to make when the fixtures that a test requests after this one have ended."""
    checks: list[Callable[[], object]] = []
    yield checks
    for check in checks:
        check()


def test_the_namespace_of_a_redis_broker_is_empty_after_the_test_but_for_a_neighbour(
    afterwards: list[Callable[[], object]],
    redis_broker: RedisBroker,
    redis_namespace: str,
    redis_client: redis.Redis,
    unique_queue: str,
) -> None:
    neighbour = f"{redis_namespace}0"
    redis_client.set(neighbour, "a neighbour's", ex=60)
    redis_broker.declare_queue(unique_queue)
    redis_client.rpush(f"{redis_namespace}:{unique_queue}", "a message")

    def check() -> None:
        assert redis_client.keys(f"{redis_namespace}*") == [neighbour.encode()]
        redis_client.delete(neighbour)

    afterwards.append(check)


def test_a_rabbitmq_broker_declares_a_queue_of_its_own_which_is_deleted_after_the_test(
    afterwards: list[Callable[[], object]], rabbitmq_url: str, rabbitmq_broker: RabbitmqBroker, unique_queue: str
) -> None:
    rabbitmq_broker.declare_queue(unique_queue, ensure=True)
    assert rabbitmq_broker.get_queue_message_counts(unique_queue) == (0, 0, 0)

    def check() -> None:
        for suffix in ("", ".DQ", ".XQ"):
            with pika.BlockingConnection(pika.URLParameters(rabbitmq_url)) as connection:
                channel = connection.channel()
                with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="NOT_FOUND"):
                    channel.queue_declare(f"{unique_queue}{suffix}", passive=True)

    afterwards.append(check)
