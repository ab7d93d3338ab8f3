"""The sentence of every command about a server that is down, or refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .app import OperationError, one_line

if TYPE_CHECKING:
    from ..stores import IdempotencyStore
    from ..transactions.database import Database

__all__ = ["database_error", "store_error"]

_NAMES = {"postgresql": "PostgreSQL", "mysql": "MariaDB", "sqlite": "SQLite"}


def database_error(database: Database, error: BaseException) -> OperationError:
    """Return the error for a call of a database that failed."""
    cause, names = error, {type(error).__name__}
    # SQLAlchemy and Django wrap the driver's error, whose text has no more than the reason.
    while isinstance(inner := getattr(cause, "orig", None) or cause.__cause__, BaseException):
        cause = inner
        names.add(type(cause).__name__)
    text = f"({one_line(cause).rstrip('.')})."
    name = _NAMES[database.dialect]
    if names.isdisjoint({"OperationalError", "InterfaceError"}) and not isinstance(cause, OSError):
        return OperationError(f"{name} refuses a statement {text}")
    return OperationError(f"{name} can't be reached at {database.place} {text}")


def store_error(store: IdempotencyStore | None, error: BaseException) -> OperationError:
    """Return the error for a call of an idempotency store that failed."""
    known: Any = store
    if type(error).__module__.partition(".")[0] == "redis" and hasattr(known, "client"):
        from ..brokers.redis.browser import unreachable

        return unreachable(known.client, error)
    if hasattr(known, "database"):
        return database_error(known.database, error)
    return OperationError(f"The idempotency store can't be reached ({one_line(error).rstrip('.')}).")
