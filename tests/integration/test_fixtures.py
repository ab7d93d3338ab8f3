"""The promises of tests/integration/conftest.py: unique names, and nothing left behind."""

from __future__ import annotations

import pika
import pika.exceptions
import pytest
import redis
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker

used: dict[str, str] = {}


def test_a_redis_broker_works_in_its_namespace(
    redis_broker: RedisBroker, redis_namespace: str, redis_client: redis.Redis, unique_queue: str
) -> None:
    redis_client.set(f"{redis_namespace}0", "a neighbour's", ex=60)
    redis_broker.declare_queue(unique_queue)
    redis_client.rpush(f"{redis_namespace}:{unique_queue}", "a message")
    used["namespace"] = redis_namespace


def test_the_namespace_of_the_test_before_is_empty_but_for_a_neighbour(redis_client: redis.Redis) -> None:
    assert redis_client.keys(f"{used['namespace']}*") == [f"{used['namespace']}0".encode()]
    redis_client.delete(f"{used['namespace']}0")


def test_a_rabbitmq_broker_declares_a_queue_of_its_own(rabbitmq_broker: RabbitmqBroker, unique_queue: str) -> None:
    rabbitmq_broker.declare_queue(unique_queue, ensure=True)
    assert rabbitmq_broker.get_queue_message_counts(unique_queue) == (0, 0, 0)
    used["queue"] = unique_queue


@pytest.mark.parametrize("suffix", ["", ".DQ", ".XQ"])
def test_a_queue_of_the_test_before_is_deleted(rabbitmq_url: str, suffix: str) -> None:
    with pika.BlockingConnection(pika.URLParameters(rabbitmq_url)) as connection:
        channel = connection.channel()
        with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="NOT_FOUND"):
            channel.queue_declare(f"{used['queue']}{suffix}", passive=True)
