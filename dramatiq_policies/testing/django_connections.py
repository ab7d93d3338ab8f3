"""Keep the test's Django connections open in the kit's worker: a ``TestCase`` has a transaction there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dramatiq.broker import Broker

__all__ = ["connections_stay_open"]

#: The hooks of django_dramatiq's DbConnectionsMiddleware that close connections of a worker's thread: unusable, then all.
_CLOSING = (
    "before_process_message",
    "after_process_message",
    "before_consumer_thread_shutdown",
    "before_worker_thread_shutdown",
    "before_worker_shutdown",
)


@contextmanager
def connections_stay_open(broker: Broker) -> Iterator[None]:
    """Switch off the hooks that close the connections of a worker's thread: here the thread of the test."""
    module = sys.modules.get("django_dramatiq.middleware")
    closing = [one for one in broker.middleware if module and isinstance(one, module.DbConnectionsMiddleware)]
    for middleware in closing:
        vars(middleware).update(dict.fromkeys(_CLOSING, _do_nothing))
    try:
        yield
    finally:
        for middleware in closing:
            for name in _CLOSING:
                del vars(middleware)[name]


def _do_nothing(*args: object, **kwargs: object) -> None:
    pass
