"""Every Python process of scripts/dramatiq_suite.py imports this module at its start, commands included."""

from __future__ import annotations

import functools
import os
import socket
from typing import Any
from urllib.parse import urlsplit

# ---------------------------------------------------------------------- the standard ports lead to the private servers

PRIVATE_PORTS = {
    6379: urlsplit(os.environ["REDIS_URL"]).port,
    5672: urlsplit(os.environ["RABBITMQ_URL"]).port,
}


def redirected(connect: Any) -> Any:
    @functools.wraps(connect)
    def to_private_port(self: socket.socket, address: Any) -> Any:
        if self.family in {socket.AF_INET, socket.AF_INET6}:
            host, port, *rest = address
            address = (host, PRIVATE_PORTS.get(port, port), *rest)
        return connect(self, address)

    return to_private_port


for name in ("connect", "connect_ex"):
    setattr(socket.socket, name, redirected(getattr(socket.socket, name)))


# ---------------------------------------------------------------------- the bundle is the default middleware

from dramatiq.brokers.rabbitmq import RabbitmqBroker  # noqa: E402
from dramatiq.brokers.redis import RedisBroker  # noqa: E402
from dramatiq.brokers.stub import StubBroker  # noqa: E402


def with_bundle(init: Any) -> Any:
    @functools.wraps(init)
    def init_and_install(self: Any, *args: Any, middleware: Any = None, **kwargs: Any) -> None:
        from dramatiq_policies import install

        init(self, *args, middleware=middleware, **kwargs)
        if middleware is None:
            install(self)

    return init_and_install


if os.environ["DP_SUITE_MIDDLEWARE"] == "bundle":
    for broker in (RabbitmqBroker, RedisBroker, StubBroker):
        broker.__init__ = with_bundle(broker.__init__)
