"""How many messages wait in each queue, and for how long: read without taking one, on each of the three brokers."""

from __future__ import annotations

from dramatiq.broker import Broker

from .base import QueueReader, QueueReading

__all__ = ["QueueReader", "QueueReading", "reader_of"]


def reader_of(broker: Broker) -> QueueReader:
    """A reader of the broker's queues, of the kind that the broker is. It connects when it is first used."""
    # By name, so that no client is imported that is not in use.
    for cls in type(broker).__mro__:
        name = f"{cls.__module__}.{cls.__name__}"
        if name == "dramatiq.brokers.redis.RedisBroker":
            from .redis import RedisReader

            return RedisReader(broker)
        if name == "dramatiq.brokers.rabbitmq.RabbitmqBroker":
            from .rabbitmq import RabbitmqReader

            return RabbitmqReader(broker)
        if name == "dramatiq.brokers.stub.StubBroker":
            from .stub import StubReader

            return StubReader(broker)
    return QueueReader(broker)
