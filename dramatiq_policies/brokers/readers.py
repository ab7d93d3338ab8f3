"""How many messages wait in each queue, and for how long: read without taking one, on each of the three brokers."""

from __future__ import annotations

from dramatiq.broker import Broker

from .._dramatiq import kind_of
from .queue_reader import QueueReader, QueueReading

__all__ = ["QueueReader", "QueueReading", "reader_of"]


def reader_of(broker: Broker) -> QueueReader:
    """A reader of the broker's queues, of the kind that the broker is. It connects when it is first used."""
    kind = kind_of(broker)
    if kind == "redis":
        from .redis.queue_reader import RedisReader

        return RedisReader(broker)
    if kind == "rabbitmq":
        from .rabbitmq.queue_reader import RabbitmqReader

        return RabbitmqReader(broker)
    if kind == "stub":
        from .stub.queue_reader import StubReader

        return StubReader(broker)
    return QueueReader(broker)
