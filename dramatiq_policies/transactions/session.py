"""The library's own connections, whatever their adapter: their settings, transactions, and repeated calls."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from .database import Connection, is_disconnect, is_transient

__all__ = ["in_transaction", "repeated", "session_settings", "sever"]

T = TypeVar("T")

_BEGIN = {
    "postgresql": "BEGIN ISOLATION LEVEL READ COMMITTED",
    "mysql": "START TRANSACTION",
    "sqlite": "BEGIN IMMEDIATE",
}
#: For how long a statement waits for a lock, in milliseconds.
_LOCK_WAIT = 1_000
#: For how long a transaction may be idle, in milliseconds: a process that stands still must not hold its locks.
_IDLE = 5_000


def session_settings(dialect: str, patience: int) -> list[str]:
    """Return statements for a new connection: the server gives up, too, and keeps no connection of an abandoned call.

    Parameters:
      patience: After how long the caller gives up, in milliseconds.
    """
    if dialect == "postgresql":
        found = {
            "lock_timeout": _LOCK_WAIT,
            "statement_timeout": patience,
            "idle_in_transaction_session_timeout": _IDLE,
        }
        # The default may be SERIALIZABLE. Calls of the library would then fail and repeat.
        isolation = "SET default_transaction_isolation = 'read committed'"
        return [isolation, *(f"SET {name} = {ms}" for name, ms in found.items())]
    if dialect == "mysql":
        mariadb = f", max_statement_time = {patience / 1_000}, idle_transaction_timeout = {_IDLE // 1_000}"
        return [
            # The comment is for MariaDB alone.
            f"SET SESSION innodb_lock_wait_timeout = {_LOCK_WAIT // 1_000} /*M!100300 {mariadb} */",
            # Without locks on gaps, which claims of other keys would wait for.
            "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED",
        ]
    return [f"PRAGMA busy_timeout = {_LOCK_WAIT}"]


def in_transaction(work: Callable[[Connection], T], connection: Connection, invalidate: Callable[[], object]) -> T:
    """Call ``work`` in a transaction of an autocommit connection. ``invalidate`` gives the connection up if it can't roll back."""
    try:
        connection.execute(_BEGIN[connection.dialect])
        answer = work(connection)
        connection.execute("COMMIT")
    except BaseException:
        try:
            connection.execute("ROLLBACK")
        except Exception:
            invalidate()
        raise
    return answer


def repeated(call: Callable[[float], T], patience: int) -> T:
    """Return ``call(deadline)``. A transient error repeats the call until the deadline, a lost connection once.

    Parameters:
      patience: After how long the last error is raised, in milliseconds.
    """
    deadline = time.monotonic() + patience / 1_000
    reconnected = False
    tries = 0
    while True:
        tries += 1
        try:
            return call(deadline)
        except Exception as error:
            if is_disconnect(error) and not reconnected:
                reconnected = True
                continue
            pause = random.uniform(0.001, 0.01 * min(tries, 10))  # noqa: S311 - no secret
            if not is_transient(error) or time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)


def sever(driver_connection: Any) -> None:
    """End a driver's wait for a server that does not answer: shut the socket down. Never raises."""
    with suppress(Exception):
        sock = getattr(driver_connection, "_sock", None)  # PyMySQL
        if sock is not None:
            sock.shutdown(socket.SHUT_RDWR)
            return
        with socket.socket(fileno=os.dup(driver_connection.fileno())) as copy:  # psycopg, psycopg2, mysqlclient
            copy.shutdown(socket.SHUT_RDWR)
