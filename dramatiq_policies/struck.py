"""Connections that an exception from outside has struck: Ctrl-C, a timeout, a shutdown.

Such a one can come between any two instructions, also between a question to a server and its answer. What comes over the
connection then is the answer to something else, or never comes. It can only be thrown away.
"""

from __future__ import annotations

import socket
import sys
from contextlib import suppress
from typing import Any

__all__ = ["drop", "keep_out_of", "strikes_anywhere"]


def strikes_anywhere(error: BaseException | None) -> bool:
    """Whether it is an exception that may have come from outside."""
    return error is not None and not isinstance(error, (Exception, GeneratorExit))


def drop(connection: Any) -> None:
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


def keep_out_of(pool: Any) -> None:
    """Have a pool of redis-py's close what was struck before it takes it back.

    redis-py closes a connection that is struck while it writes or reads, but not between the two: then the next command is
    given this one's answer, and each later one that of the one before. (Its pools look for unread data when they give a
    connection out, which may not have come yet; and from 8.0 on, by default, they don't look.)
    """
    release = getattr(pool, "release", None)
    # A cluster's client has no pool of its own.
    if release is None or getattr(release, "closes_struck", False):
        return

    def closing(connection: Any) -> None:
        if strikes_anywhere(sys.exc_info()[1]):
            connection.disconnect()
        release(connection)

    closing.closes_struck = True  # type: ignore[attr-defined]
    pool.release = closing
