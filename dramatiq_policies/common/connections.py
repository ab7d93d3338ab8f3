"""Connections that must not be used again: struck by an exception from outside, or to a server that lost its rank.

Ctrl-C, a timeout, a shutdown can come between any two instructions, also between a question to a server and its answer.
What comes over the connection then is the answer to something else, or never comes. It can only be thrown away. A Redis
that answers READONLY is no master any more: its name or address may lead to the next one, but only who connects anew asks.
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
    """Whether it is an exception that may have come from outside."""
    return error is not None and not issubclass(type(error), (Exception, GeneratorExit))


def discard(connection: Any) -> None:
    """Close what a BlockingConnection of pika's has opened and say nothing to the server, which sees that we are gone.

    Its own `close` waits for an answer to each channel's end. Nobody must use it afterwards. Waits for nothing and raises
    nothing.
    """
    inner: Any = getattr(connection, "_impl", None)
    sock: Any = getattr(getattr(inner, "_transport", None), "_sock", None)
    # Whatever state it was left in; what can't be closed here is closed when it is collected.
    with suppress(Exception):
        sock.shutdown(socket.SHUT_RDWR)
    with suppress(Exception):
        sock.close()
    with suppress(Exception):
        inner.ioloop.close()


def is_demoted(error: BaseException | None) -> bool:
    """Whether a Redis has answered that it is a replica. Nothing of the command was carried out."""
    # From inside a script Redis 6 answers it as the text of another error.
    return error is not None and (type(error).__name__ == "ReadOnlyError" or "READONLY You can't write" in str(error))


def reconnect(pool: Any) -> None:
    """Have a pool of redis-py's connect anew for whatever is asked next; one that is in use closes when it is given back."""
    queue = getattr(pool, "pool", None)
    in_use = getattr(pool, "_in_use_connections", None)
    # A BlockingConnectionPool's list has the idle ones, too.
    in_use = set(getattr(pool, "_connections", ()) if in_use is None else in_use)
    if queue is None:
        pool.disconnect(inuse_connections=False)
    else:
        # Taken out one by one, so that nobody else is given them meanwhile.
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
    """Have a pool of redis-py's close what must not be used again before it takes it back.

    redis-py closes a connection that is struck while it writes or reads, but not between the two: then the next command is
    given this one's answer, and each later one that of the one before. (Its pools look for unread data when they give a
    connection out, which may not have come yet; and from 8.0 on, by default, they don't look.) Nor does it leave a server
    that was demoted, but by Sentinel's clients.
    """
    release = getattr(pool, "release", None)
    # A cluster's client has no pool of its own.
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
