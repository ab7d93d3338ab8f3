"""The registers of an idempotency store as rows of a table, one per key.

Each write is a single statement with its own commit. So a kill leaves no half claim, and no call holds a lock while waiting for
another. An expired row counts as absent. Processes that write also delete expired rows, a few at a time.
"""

# ruff: noqa: S608 - the names of tables and the clocks are constants, and every value is a parameter

from __future__ import annotations

import hashlib
import itertools
import random
import time
from collections.abc import Callable, Sequence
from copy import copy
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from ..common import clock
from ..common.safe_logger import SafeLogger
from ..errors import ConfigurationError, MissingTable
from ..stores import Entry, Renewal
from .database import KEYS, NOW, Connection, Database, is_duplicate, is_missing_table, list_params
from .durability import durability_warnings

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["DEFAULT_NAMESPACE", "KeyTable"]

logger = SafeLogger("dramatiq_policies.outcomes")

T = TypeVar("T")


class _Default(str):
    """The type of the default namespace, to tell the default from an equal namespace of the user."""

    __slots__ = ()


DEFAULT_NAMESPACE = _Default("idem")
#: How many expired rows are deleted at once, and after how many writes of a process.
_BATCH, _WRITES_PER_BATCH = 500, 100
#: Renewals per call: a call stays short.
_RENEWALS = 100
#: A row may come or go between two statements of a swap.
_TRIES = 20


class KeyTable:
    """The base of `SqlStore` and `DjangoStore`: an `IdempotencyStore` over a `Database`.

    Parameters:
      database: The connections of the store.
      namespace: Separates the keys of services that share the table.

    Raises:
      ConfigurationError: The namespace is invalid.
    """

    #: 0.1.0 has no such store, so every record may have the form of today.
    may_hold_earlier_records = False
    #: The advice for a missing table.
    how_to_create = ""

    def __init__(self, database: Database, namespace: str = DEFAULT_NAMESPACE) -> None:
        if namespace is not DEFAULT_NAMESPACE and (type(namespace) is not str or not namespace):
            expected = "a non-empty str"
            raise ConfigurationError.of_option(type(self).__name__, "namespace", expected, namespace)
        self.database = database
        #: Whether the user gave a namespace, which tells services apart.
        self.is_namespaced = namespace is not DEFAULT_NAMESPACE
        self.namespace = str(namespace)
        #: Whether keys expire by the clock of the test kit.
        self.virtual = False
        # Processes that start together do not delete together.
        self._writes = itertools.count(random.randrange(_WRITES_PER_BATCH))  # noqa: S311 - no secret

    def for_stub(self) -> Self:
        """Return a store on the same database, with a fresh namespace, whose keys expire by the clock of the test kit."""
        stub = copy(self)
        stub.namespace = f"stub-{uuid4().hex}"
        stub.virtual = True
        return stub

    def swap(self, key: str, expected: bytes | None, value: bytes | None, ttl: int) -> Entry | None:
        name = self.name_of(key)
        return self._write(lambda rows: rows.swap(name, expected, value, ttl))

    def get_within(self, connection: Connection, key: str) -> Entry:
        """Read a register within the transaction of a connection of the application."""
        return _Rows(connection, self._ahead()).read(self.name_of(key), "read_within")

    def swap_within(self, connection: Connection, key: str, expected: bytes | None, value: bytes, ttl: int) -> bool:
        """Swap within the transaction of a connection of the application.

        Returns:
          Whether the register held ``expected`` and now holds ``value``.
        """
        return _Rows(connection, self._ahead()).swapped(self.name_of(key), expected, value, ttl)

    def put(self, key: str, value: bytes, ttl: int) -> None:
        name = self.name_of(key)
        self._write(lambda rows: rows.change("put", name=name, value=value, ttl=ttl))

    def get(self, key: str) -> Entry:
        name = self.name_of(key)
        return self._call(lambda rows: rows.read(name))

    def delete(self, key: str) -> bool:
        name = self.name_of(key)
        return self._write(lambda rows: rows.change("delete", name=name))

    def renew(self, renewals: Sequence[Renewal]) -> list[bool]:
        # A statement for each row: whoever holds a single lock is in no deadlock.
        named = [(self.name_of(key), value, ttl) for key, value, ttl in renewals]
        answers: list[bool] = []
        for start in range(0, len(named), _RENEWALS):
            answers += self._write(partial(_renewed, named[start : start + _RENEWALS]))
        return answers

    def name_of(self, key: str) -> str:
        """Return the name of a register's row: a digest, so the database does not see the arguments of your jobs."""
        return _digest(f"{self.namespace}\0{key}")

    def warnings(self) -> list[str]:
        """Return warnings about the configuration of the server. Connects.

        Raises:
          MissingTable: The table does not exist.
        """
        self.get("")
        return self.database.run(durability_warnings)

    def _write(self, work: Callable[[_Rows], T]) -> T:
        answer = self._call(work)
        if next(self._writes) % _WRITES_PER_BATCH == 0:
            try:
                self._call(_Rows.delete_expired)
            except Exception as error:
                # The answer counts. Another process deletes the rows, or this one later.
                logger.debug("Expired keys could not be deleted: %s: %s", type(error).__name__, error)
        return answer

    def _call(self, work: Callable[[_Rows], T]) -> T:
        # The clock of the kit is in force on this thread only.
        ahead = self._ahead()
        try:
            return self.database.run(lambda connection: work(_Rows(connection, ahead)))
        except Exception as error:
            if is_missing_table(error):
                raise MissingTable(f"The database has no table {KEYS}: {self.how_to_create}.") from error
            raise

    def _ahead(self) -> int | None:
        """Return how far the kit's clock is ahead of the database's, in milliseconds; None outside of the kit."""
        return round((clock.monotonic() - time.monotonic()) * 1_000) if self.virtual else None


class _Rows:
    """The rows, over a connection."""

    __slots__ = ("_connection", "_params", "_sql")

    def __init__(self, connection: Connection, ahead: int | None) -> None:
        self._connection = connection
        self._sql = _statements(connection.dialect, virtual=ahead is not None)
        self._params = {} if ahead is None else {"ahead": ahead}

    def change(self, statement: str, **params: Any) -> bool:
        """Run a statement and return whether it has changed a row."""
        return self._connection.execute(self._sql[statement], **params, **self._params).rowcount > 0

    def read(self, name: str, statement: str = "read") -> Entry:
        for value, left in self._connection.execute(self._sql[statement], name=name, **self._params).rows:
            if left > 0:
                return Entry(bytes(value), int(left))
        return Entry(None, 0)

    def swap(self, name: str, expected: bytes | None, value: bytes | None, ttl: int) -> Entry | None:
        found = Entry(None, 0)
        for _ in range(_TRIES):
            if (expected, value) != (None, None) and self.swapped(name, expected, value, ttl):
                return None
            found = self.read(name)
            if found.value != expected:
                return found
            if value is None and expected is None:
                return None
        return found

    def swapped(self, name: str, expected: bytes | None, value: bytes | None, ttl: int) -> bool:
        if expected is not None:
            if value is None:
                return self.change("remove", name=name, expected=expected)
            return self.change("swap", name=name, expected=expected, value=value, ttl=ttl)
        try:
            return self.change("insert", name=name, value=value, ttl=ttl)
        except Exception as error:
            # MariaDB: ON DUPLICATE KEY counts a found row like a new row, and IGNORE hides all errors.
            if not is_duplicate(error):
                raise
            return self.change("replace", name=name, value=value, ttl=ttl)

    def delete_expired(self) -> None:
        connection, sql = self._connection, self._sql
        if connection.dialect != "mysql":
            connection.execute(sql["delete_expired"], **self._params)
            return
        # By the primary key: a deletion by another index locks in another order than the writes of keys.
        names = [row[0] for row in connection.execute(sql["expired"], **self._params).rows]
        if names:
            listed, params = list_params("name", names)
            connection.execute(f"{sql['delete_listed']} AND name IN ({listed})", **params, **self._params)


def _renewed(renewals: Sequence[tuple[str, bytes, int]], rows: _Rows) -> list[bool]:
    return [rows.change("renew", name=name, value=value, ttl=ttl) for name, value, ttl in renewals]


@lru_cache(maxsize=1024)  # Used twice per job: for the claim and for the completion.
def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache
def _statements(dialect: str, *, virtual: bool) -> dict[str, str]:
    now = f"({NOW[dialect]} + :ahead)" if virtual else NOW[dialect]
    until = f"{now} + :ttl"
    live = f"expires_at > {now}"
    insert = f"INSERT INTO {KEYS} (name, value, expires_at) VALUES (:name, :value, {until})"
    expired = f"SELECT name FROM {KEYS} WHERE expires_at <= {now} ORDER BY expires_at LIMIT {_BATCH}"
    write = f"UPDATE {KEYS} SET value = :value, expires_at = {until} WHERE name = :name"
    read = f"SELECT value, expires_at - {now} FROM {KEYS} WHERE name = :name"
    found = {
        "read": read,
        # Under REPEATABLE READ, MariaDB and MySQL would read the state of the transaction's begin, and yet write to the present one.
        "read_within": f"{read} FOR UPDATE" if dialect == "mysql" else read,
        "swap": f"{write} AND value = :expected AND {live}",
        "remove": f"DELETE FROM {KEYS} WHERE name = :name AND value = :expected AND {live}",
        "delete": f"DELETE FROM {KEYS} WHERE name = :name AND {live}",
        "renew": f"UPDATE {KEYS} SET expires_at = {until} WHERE name = :name AND value = :value AND {live}",
    }
    if dialect == "mysql":
        return found | {
            "insert": insert,
            "replace": f"{write} AND expires_at <= {now}",
            "put": f"{insert} ON DUPLICATE KEY UPDATE value = :value, expires_at = {until}",
            "expired": expired,
            "delete_listed": f"DELETE FROM {KEYS} WHERE expires_at <= {now}",
        }
    upsert = f"{insert} ON CONFLICT (name) DO UPDATE SET value = excluded.value, expires_at = excluded.expires_at"
    # PostgreSQL may run a subquery of IN more than once.
    within = f"= ANY (ARRAY({expired} FOR UPDATE SKIP LOCKED))" if dialect == "postgresql" else f"IN ({expired})"
    return found | {
        "insert": f"{upsert} WHERE {KEYS}.expires_at <= {now}",
        "put": upsert,
        "delete_expired": f"DELETE FROM {KEYS} WHERE name {within}",
    }
