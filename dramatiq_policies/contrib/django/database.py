"""Django's databases for the library: its own connections, and the application's within a transaction."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, TypeVar
from weakref import finalize

from django.core import mail
from django.db import connections, transaction
from django.db.utils import load_backend

from ...common.forks import after_fork
from ...errors import ConfigurationError
from ...transactions.database import DIALECTS, Connection, Result, place_of
from ...transactions.session import in_transaction, repeated, session_settings, sever
from ...transactions.threads import Call, DatabaseThreads
from .connections import is_of_a_test_case

__all__ = ["DjangoConnection", "DjangoDatabase", "ThreadConnection", "checked_using", "how_to_migrate"]

T = TypeVar("T")

_PARAMETER = re.compile(r"(?<![:\w]):(\w+)")
#: Connections of a parent process: a child neither uses nor closes them.
_inherited: list[object] = []


def checked_using(where: str, using: object) -> str:
    """Return the alias of a database.

    Raises:
      ConfigurationError: The value is no text. The settings are read at the first use.
    """
    if type(using) is not str or not using:
        raise ConfigurationError.of_option(where, "using", "the alias of a database, as in DATABASES", using)
    return using


def how_to_migrate(using: str) -> str:
    """Return how to make the tables."""
    database = "" if using == "default" else f" --database {using}"
    return f'run "manage.py migrate dramatiq_policies{database}"'


def dialect_of(connection: Any) -> str:
    """Return the dialect of Django's connection.

    Raises:
      ConfigurationError: The database is of another kind.
    """
    vendor: str = connection.vendor  # Of MariaDB, too, "mysql".
    if vendor not in DIALECTS:
        raise ConfigurationError(
            f"The database {connection.alias!r} is {connection.display_name}: use PostgreSQL, MariaDB, MySQL or SQLite."
        )
    return vendor


class DjangoConnection:
    """Django's connection, inside or outside of a transaction, as a `Connection` of `dramatiq_policies.transactions`."""

    __slots__ = ("connection", "dialect")

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.dialect = dialect_of(connection)

    def execute(self, sql: str, /, **params: Any) -> Result:
        with self.connection.cursor() as cursor:
            cursor.execute(_with_django_s_parameters(sql), params)
            if cursor.description is None:
                # Cursors of psycopg have no such attribute.
                last_id = None if self.dialect == "postgresql" else cursor.lastrowid
                return Result((), cursor.rowcount, last_id)
            # psycopg2 reads bytes as a memoryview.
            rows = [tuple(bytes(one) if isinstance(one, memoryview) else one for one in row) for row in cursor]
            return Result(rows, len(rows))


class ThreadConnection:
    """The calling thread's connection at the time of a call. An interrupt replaces the connection."""

    __slots__ = ("using",)

    def __init__(self, using: str) -> None:
        self.using = using

    @property
    def dialect(self) -> str:
        return dialect_of(connections[self.using])

    def execute(self, sql: str, /, **params: Any) -> Result:
        return DjangoConnection(connections[self.using]).execute(sql, **params)


@lru_cache(maxsize=256)
def _with_django_s_parameters(sql: str) -> str:
    return _PARAMETER.sub(r"%(\1)s", sql.replace("%", "%%"))


class DjangoDatabase:
    """Connections to a database of Django's settings, for the library alone: a `Database` of `dramatiq_policies.transactions`.

    They belong neither to a request nor to a job, and `connections.close_all()` does not close them. While Django's test
    environment is set up, no connection is kept: else a test database could not be dropped. An SQLite database in memory is called
    over the connection of the calling thread, and so is any database in a ``TestCase``, whose transaction locks what a job writes.

    Parameters:
      using: The alias.
      limit: How many connections this process may use at once.
      patience: After how long a call without an answer raises, in milliseconds.
    """

    def __init__(self, using: str, *, limit: int = 4, patience: int = 3_000) -> None:
        self.using = using
        self._patience = patience
        self._limit = limit
        self._open()
        after_fork(self)

    def _open(self) -> None:
        self._calls: DatabaseThreads | None = None
        self._idle: deque[Any] = deque()
        self._end = finalize(self, _close_each, self._idle)

    @property
    def dialect(self) -> str:
        return dialect_of(connections[self.using])

    @property
    def place(self) -> str:
        given = connections[self.using].settings_dict
        return place_of(self.dialect, given.get("HOST"), given.get("PORT"), given.get("NAME"))

    def reset_after_fork(self) -> None:
        """Start with new connections."""
        self._end.detach()
        _inherited.append(self._idle)
        self._open()

    def run(self, work: Callable[[Connection], T]) -> T:
        connection = connections[self.using]
        if _is_in_memory(connection):
            return repeated(lambda deadline: work(DjangoConnection(connection)), self._patience)
        if is_of_a_test_case(connection):
            # In a savepoint: an error must not end the transaction of the test.
            with transaction.atomic(using=self.using):
                return work(DjangoConnection(connection))
        return repeated(partial(self._threads.call, partial(self._run, work)), self._patience)

    @property
    def _threads(self) -> DatabaseThreads:
        """The threads that call; made at the first use, because the settings name the engine."""
        if self._calls is None:
            # SQLite has one writer: threads wait in turn for one connection, and not in a race for the file's lock.
            limit = 1 if self.dialect == "sqlite" else self._limit
            self._calls = DatabaseThreads("dramatiq-policies-django", limit)
        return self._calls

    def transaction(self, work: Callable[[Connection], T]) -> T:
        connection = connections[self.using]
        if _is_in_memory(connection) or is_of_a_test_case(connection):
            return self.run(work)
        return self.run(partial(_in_transaction, work))

    def close(self) -> None:
        """Close the idle connections. The next call opens new ones."""
        _close_each(self._idle)
        if self._calls is not None:
            self._calls.close()

    def _run(self, work: Callable[[Connection], T], call: Call) -> T:
        """Call ``work`` in one of the threads."""
        connection = self._take()
        is_ready = connection.connection is not None
        try:
            if not is_ready:
                self._connect(connection)
                is_ready = True
            call.severed_by(partial(sever, connection.connection))
            answer = work(DjangoConnection(connection))
        except Exception as error:
            if connection.connection is not None and not connection.is_usable():
                # The server has closed this connection, and perhaps the idle connections, too.
                error.connection_invalidated = True  # type: ignore[attr-defined]
                connection.close()
                _close_each(self._idle)
            raise
        finally:
            call.severed_by(None)
            self._give_back(connection, is_ready=is_ready)
        return answer

    def _take(self) -> Any:
        try:
            return self._idle.pop()
        except IndexError:
            pass
        known = connections.settings[self.using]
        # Without a pool of Django's, whose connections are the application's.
        options = {name: value for name, value in known["OPTIONS"].items() if name != "pool"}
        settings = {**known, "OPTIONS": options, "AUTOCOMMIT": True, "CONN_MAX_AGE": None, "CONN_HEALTH_CHECKS": False}
        connection = load_backend(known["ENGINE"]).DatabaseWrapper(settings, self.using)
        # Another thread may use it next.
        connection.inc_thread_sharing()
        return connection

    def _connect(self, connection: Any) -> None:
        connection.connect()
        if connection.settings_dict.get("DISABLE_SERVER_SIDE_CURSORS"):
            # A pool between here and the server (PgBouncer): its connections serve others after us.
            return
        with connection.cursor() as cursor:
            for statement in session_settings(connection.vendor, self._patience):
                cursor.execute(statement)

    def _give_back(self, connection: Any, *, is_ready: bool) -> None:
        if connection.connection is None:
            return
        # No call may use a connection without its settings. Django's test environment has `mail.outbox`: no connection stays open there.
        if not is_ready or hasattr(mail, "outbox"):
            connection.close()
        else:
            self._idle.append(connection)


def _in_transaction(work: Callable[[Connection], T], connection: Connection) -> T:
    assert isinstance(connection, DjangoConnection)
    return in_transaction(work, connection, connection.connection.close)


def _close_each(idle: deque[Any]) -> None:
    while idle:
        idle.pop().close()


def _is_in_memory(connection: Any) -> bool:
    return connection.vendor == "sqlite" and bool(connection.is_in_memory_db())
