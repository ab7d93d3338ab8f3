"""What pika's connections lack: an end without a conversation.

`BlockingConnection.close` closes channel by channel, and waits each time for the server's answer. An exception from outside
(Ctrl-C, an interrupt of a job) can strike between any two instructions of an earlier conversation: then the answer that is
waited for may have been lost half-way, and the next call waits for ever. Such a connection can only be dropped.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Any

__all__ = ["drop", "strikes_anywhere"]


def strikes_anywhere(error: BaseException) -> bool:
    """Whether an exception may have come from outside, in the middle of a conversation."""
    return not isinstance(error, (Exception, GeneratorExit))


def drop(connection: Any) -> None:
    """Close what a BlockingConnection has opened and say nothing to the server, which sees that we are gone.

    Nobody must use it afterwards. Waits for nothing and raises nothing.
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
