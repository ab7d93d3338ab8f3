"""The database as the library sees it: statements with ``:name`` parameters, on PostgreSQL, MariaDB or MySQL, and SQLite.

Each statement of the library is written once, in plain SQL. An adapter runs it: SQLAlchemy's in `dramatiq_policies.sql`, Django's
in `dramatiq_policies.contrib.django`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

__all__ = [
    "DIALECTS",
    "KEYS",
    "NOW",
    "OUTBOX",
    "Connection",
    "Database",
    "Result",
    "for_update_skip_locked",
    "has_rolled_back",
    "is_disconnect",
    "is_duplicate",
    "is_missing_table",
    "is_transient",
    "list_params",
    "place_of",
]

T = TypeVar("T")

#: The lengths of lists in statements.
_LENGTHS = (1, 10, 100, 500, 1_000)
#: The tables' names.
KEYS = "dramatiq_policies_keys"
OUTBOX = "dramatiq_policies_outbox"

DIALECTS = ("postgresql", "mysql", "sqlite")

#: The database's clock at the start of the statement, in milliseconds since the epoch, by dialect. An index serves a comparison.
NOW = {
    "postgresql": "CAST(EXTRACT(EPOCH FROM statement_timestamp()) * 1000 AS BIGINT)",
    "mysql": "(TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6)) DIV 1000)",
    "sqlite": "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)",
}


class Result(NamedTuple):
    """The rows of a query (none for a write), the number of rows that a write has matched, and the id of an inserted row.

    PostgreSQL and some drivers report no id.
    """

    rows: Sequence[Sequence[Any]]
    rowcount: int
    last_id: int | None = None


class Connection(Protocol):
    """A connection to the database."""

    @property
    def dialect(self) -> str:
        """``"postgresql"``, ``"mysql"`` (MariaDB too) or ``"sqlite"``."""

    def execute(self, sql: str, /, **params: Any) -> Result:
        """Run a statement with ``:name`` parameters: int, str, bytes or None."""


class Database(Protocol):
    """Connections of the library's own: never the caller's, and never in the caller's transaction.

    The number of connections in a process is bounded, whatever the number of threads. A call raises within a bounded time. ``work``
    may be repeated (a stale connection, a deadlock, a serialization failure, SQLite's "database is locked"), and may run in another
    thread: it only calls the connection, and never the database again.
    """

    @property
    def dialect(self) -> str: ...

    @property
    def place(self) -> str:
        """The server's host and port, or the file of SQLite: for errors."""

    def run(self, work: Callable[[Connection], T]) -> T:
        """Call ``work`` with a connection on which each statement commits by itself. ``work`` must be safe to repeat."""

    def transaction(self, work: Callable[[Connection], T]) -> T:
        """Call ``work`` within a transaction of its own, isolated as READ COMMITTED where there is a choice."""

    def reset_after_fork(self) -> None:
        """Start with new connections in a forked child."""


def place_of(dialect: str, host: str | None, port: Any, file: Any) -> str:
    """Return the `Database.place` of an address."""
    if dialect == "sqlite":
        return str(file or ":memory:")
    return f"{host or 'localhost'}:{port or (5432 if dialect == 'postgresql' else 3306)}"


def for_update_skip_locked(connection: Connection) -> str:
    """Return the end of a SELECT that locks rows and skips those of other transactions, as far as the server can do so.

    PostgreSQL, MySQL 8 and MariaDB 10.6 can. Before those, the SELECT waits; SQLite locks the whole file.
    """
    if connection.dialect == "postgresql":
        return " FOR UPDATE SKIP LOCKED"
    if connection.dialect == "sqlite":
        return ""
    (version,) = connection.execute("SELECT VERSION()").rows[0]
    text = version.decode() if isinstance(version, bytes) else str(version)
    numbers = text.removeprefix("5.5.5-").split("-")[0].split(".")
    can = tuple(int(number) for number in numbers[:2]) >= ((10, 6) if "mariadb" in text.lower() else (8, 0))
    return " FOR UPDATE SKIP LOCKED" if can else " FOR UPDATE"


def list_params(prefix: str, values: Sequence[Any]) -> tuple[str, dict[str, Any]]:
    """Return the parameters of a list: their names for the statement, and their values.

    The last value is repeated up to one of a few lengths, because adapters cache statements by their text.
    """
    length = next((length for length in _LENGTHS if length >= len(values)), len(values))
    padded = [*values, *[values[-1]] * (length - len(values))]
    params = {f"{prefix}{number}": value for number, value in enumerate(padded)}
    return ", ".join(f":{name}" for name in params), params


#: SQLSTATEs of PostgreSQL: serialization failure, deadlock.
_TRANSIENT_STATES = {"40001", "40P01"}
#: MariaDB and MySQL: record changed since last read, deadlock.
_TRANSIENT_NUMBERS = {1020, 1213}
#: MariaDB and MySQL roll back the whole transaction: as above, and lock table full.
_ROLLED_BACK_NUMBERS = {*_TRANSIENT_NUMBERS, 1206}
#: Too many connections, server shutdown, read error, connection lost or refused. The driver's own numbers begin with 2.
_DISCONNECT_NUMBERS = {1053, 1077, 1079, 1158, 1159, 1160, 1161, 1927, 2006, 2013, 2014, 2045, 2055, 4031}


def is_transient(error: BaseException) -> bool:
    """Return whether a deadlock, a serialization failure or a lock stopped the work: repeated, it may succeed."""
    return any(
        _state(one) in _TRANSIENT_STATES
        or _number(one) in _TRANSIENT_NUMBERS
        or (_is_sqlite(one) and ("database is locked" in str(one) or "table is locked" in str(one)))
        for one in _chain(error)
    )


def has_rolled_back(error: BaseException) -> bool:
    """Return whether MariaDB or MySQL has rolled back the whole transaction and begins another with the next statement.

    PostgreSQL refuses further statements.
    """
    return any(_number(one) in _ROLLED_BACK_NUMBERS for one in _chain(error))


def is_disconnect(error: BaseException) -> bool:
    """Return whether the connection is lost: on a new one, the work may succeed."""
    for one in _chain(error):
        state = _state(one) or ""
        # 08: connection exception; 57P01 to 57P03: the server shuts down or starts.
        if state.startswith(("08", "57P")) or _number(one) in _DISCONNECT_NUMBERS:
            return True
        if getattr(one, "connection_invalidated", False) or isinstance(one, ConnectionError):
            return True
    return False


def is_duplicate(error: BaseException) -> bool:
    """Return whether a row with this primary key exists."""
    return any(
        _state(one) == "23505" or _number(one) == 1062 or (_is_sqlite(one) and "UNIQUE constraint" in str(one))
        for one in _chain(error)
    )


def is_missing_table(error: BaseException) -> bool:
    """Return whether the database has no such table."""
    return any(
        _state(one) in ("42P01", "42S02") or _number(one) == 1146 or (_is_sqlite(one) and "no such table" in str(one))
        for one in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and its causes, down to the error of the driver."""
    seen = 0
    while error is not None and seen < 10:
        yield error
        orig = getattr(error, "orig", None)
        error = orig if isinstance(orig, BaseException) else error.__cause__
        seen += 1


def _state(error: BaseException) -> str | None:
    # psycopg and asyncpg; psycopg2; SQLAlchemy's wrapper for asyncpg.
    found = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    if error.args and isinstance(error.args[0], dict):  # pg8000
        found = error.args[0].get("C")
    return found if isinstance(found, str) else None


def _number(error: BaseException) -> int | None:
    # MariaDB's own driver has the number in an attribute only.
    number = getattr(error, "errno", None) or (error.args[0] if error.args else None)
    return number if type(number) is int and not isinstance(error, OSError) else None


def _is_sqlite(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in ("sqlite3", "aiosqlite", "sqlalchemy", "django")
