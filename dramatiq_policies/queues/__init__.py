"""How many messages wait in each queue, and for how long: read without taking one, on each of the three brokers."""

from __future__ import annotations

from dramatiq.broker import Broker

from ..broker_kinds import kind_of
from .base import QueueReader, QueueReading

__all__ = ["QueueReader", "QueueReading", "reader_of"]


def reader_of(broker: Broker) -> QueueReader:
    """A reader of the broker's queues, of the kind that the broker is. It connects when it is first used."""
    kind = kind_of(broker)
    if kind == "redis":
        from .redis import RedisReader

        return RedisReader(broker)
    if kind == "rabbitmq":
        from .rabbitmq import RabbitmqReader

        return RabbitmqReader(broker)
    if kind == "stub":
        from .stub import StubReader

        return StubReader(broker)
    return QueueReader(broker)
