"""Which of the three brokers, whose storage we know, a broker is."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dramatiq.broker import Broker

__all__ = ["kind_of"]

Kind = Literal["stub", "redis", "rabbitmq"]

_CLASSES: dict[Kind, str] = {"stub": "StubBroker", "redis": "RedisBroker", "rabbitmq": "RabbitmqBroker"}


def kind_of(broker: Broker) -> Kind | None:
    """``"stub"``, ``"redis"`` or ``"rabbitmq"``, subclasses included; None for any other broker."""
    for kind, name in _CLASSES.items():
        # Who has such a broker has imported its module; no client is imported that is not in use.
        module = sys.modules.get(f"dramatiq.brokers.{kind}")
        if module is not None and isinstance(broker, getattr(module, name)):
            return kind
    return None
