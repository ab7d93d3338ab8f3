"""Warnings about servers with unsafe commits."""

from __future__ import annotations

from .database import KEYS, Connection

__all__ = ["durability_warnings"]


def durability_warnings(connection: Connection) -> list[str]:
    """Return a warning if a crash of the server may undo commits: a job may run twice."""
    if connection.dialect == "postgresql":
        settings = ("fsync", "synchronous_commit")
        off = " and ".join(name for name in settings if _setting(connection, f"SHOW {name}") == "off")
        return [_warning(f"{off} off", f"Turn {off} on")] if off else []
    if connection.dialect == "mysql":
        engine = _setting(
            connection,
            "SELECT engine FROM information_schema.tables WHERE table_schema = DATABASE() AND table_name = :name",
            name=KEYS,
        )
        warnings = []
        if engine.lower() != "innodb":
            reason = f"a table {KEYS} of the engine {engine}, not InnoDB"
            warnings.append(_warning(reason, f"Run ALTER TABLE {KEYS} ENGINE=InnoDB"))
        flush = _setting(connection, "SELECT @@innodb_flush_log_at_trx_commit")
        if flush not in ("1", "3"):
            warnings.append(_warning(f"innodb_flush_log_at_trx_commit = {flush}", "Set it to 1"))
        return warnings
    return []


def _setting(connection: Connection, sql: str, **params: str) -> str:
    (found,) = connection.execute(sql, **params).rows[0]
    return found.decode() if isinstance(found, bytes) else str(found)


def _warning(reason: str, do: str) -> str:
    return f"The idempotency store's database may lose keys in a crash ({reason}): a job may then run twice. {do}."
