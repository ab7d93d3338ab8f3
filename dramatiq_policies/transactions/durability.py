"""Warnings about servers with unsafe commits."""

from __future__ import annotations

from .database import KEYS, Connection

__all__ = ["durability_warnings"]


def durability_warnings(connection: Connection) -> list[str]:
    """Return a warning if a crash of the server may undo commits: a job may run twice."""
    if connection.dialect == "postgresql":
        found = [name for name in ("fsync", "synchronous_commit") if _setting(connection, f"SHOW {name}") == "off"]
        return [_warning(f"{' and '.join(found)} off", f"Turn {' and '.join(found)} on")] if found else []
    if connection.dialect == "mysql":
        engine = _setting(
            connection,
            "SELECT engine FROM information_schema.tables WHERE table_schema = DATABASE() AND table_name = :name",
            name=KEYS,
        )
        warnings = (
            []
            if engine.lower() == "innodb"
            else [
                _warning(f"a table {KEYS} of the engine {engine}, not InnoDB", f"Run ALTER TABLE {KEYS} ENGINE=InnoDB")
            ]
        )
        flush = _setting(connection, "SELECT @@innodb_flush_log_at_trx_commit")
        return (
            warnings
            if flush in ("1", "3")
            else [*warnings, _warning(f"innodb_flush_log_at_trx_commit = {flush}", "Set it to 1")]
        )
    return []


def _setting(connection: Connection, sql: str, **params: str) -> str:
    (found,) = connection.execute(sql, **params).rows[0]
    return found.decode() if isinstance(found, bytes) else str(found)


def _warning(reason: str, do: str) -> str:
    return f"The idempotency store's database may lose keys in a crash ({reason}): a job may then run twice. {do}."
