"""Close connections that must not be reused: interrupted by an async exception, or connected to a demoted Redis.

Ctrl-C, a timeout or a shutdown can interrupt a thread between a request and its reply. The next request on the connection would
then read the wrong reply, so the connection must be closed. A Redis server that answers READONLY is no longer the master. A new
connection finds the new master.
"""

from __future__ import annotations

import socket
import sys
from contextlib import suppress
from queue import Empty
from typing import Any
from weakref import WeakSet

__all__ = ["close_when_interrupted", "discard", "is_async_exception", "is_demoted", "reconnect"]


def is_async_exception(error: BaseException | None) -> bool:
    """Return whether the exception may have been raised from another thread or by a signal."""
    return error is not None and not issubclass(type(error), (Exception, GeneratorExit))


def discard(connection: Any) -> None:
    """Close the socket of a BlockingConnection of pika without a goodbye. Never waits, never raises.

    pika's `close` waits for a reply for each channel. The connection must not be used afterwards.
    """
    inner: Any = getattr(connection, "_impl", None)
    sock: Any = getattr(getattr(inner, "_transport", None), "_sock", None)
    # The connection may be in any state. The garbage collector closes the rest.
    with suppress(Exception):
        sock.shutdown(socket.SHUT_RDWR)
    with suppress(Exception):
        sock.close()
    with suppress(Exception):
        inner.ioloop.close()


def is_demoted(error: BaseException | None) -> bool:
    """Return whether Redis refused the command as a replica. Nothing was executed."""
    # Inside a script, Redis 6 wraps the text in another error.
    return error is not None and (type(error).__name__ == "ReadOnlyError" or "READONLY You can't write" in str(error))


def reconnect(pool: Any) -> None:
    """Close the idle connections of a redis-py pool now, and each used connection on release."""
    queue = getattr(pool, "pool", None)
    in_use = getattr(pool, "_in_use_connections", None)
    # The list of a BlockingConnectionPool includes the idle connections.
    in_use = set(getattr(pool, "_connections", ()) if in_use is None else in_use)
    if queue is None:
        pool.disconnect(inuse_connections=False)
    else:
        # Take all connections: other threads must not get them now.
        taken = []
        with suppress(Empty):
            while True:
                taken.append(queue.get_nowait())
        for connection in filter(None, taken):
            connection.disconnect()
        for connection in taken:
            queue.put_nowait(connection)
        in_use.difference_update(taken)
    stale = getattr(pool.release, "stale", None)
    if stale is not None:
        stale.update(in_use)


def close_when_interrupted(pool: Any) -> None:
    """Patch a redis-py pool: on release, close a connection that was interrupted or leads to a demoted server.

    redis-py closes a connection if an exception interrupts a write or a read, but not between the two. The next command would then
    read the reply of this command, and so on. (The pool checks for unread data on checkout, but the reply may arrive later. From
    8.0 on, the pool does not check by default.) Only Sentinel clients leave a demoted server.
    """
    release = getattr(pool, "release", None)
    # A cluster client has no pool.
    if release is None or getattr(release, "closes_interrupted", False):
        return
    stale: WeakSet[Any] = WeakSet()

    def closing(connection: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None:
            if is_async_exception(error):
                connection.disconnect()
            elif is_demoted(error):
                connection.disconnect()
                reconnect(pool)
        if stale and connection in stale:
            stale.discard(connection)
            connection.disconnect()
        release(connection)

    closing.closes_interrupted = True  # type: ignore[attr-defined]
    closing.stale = stale  # type: ignore[attr-defined]
    pool.release = closing
