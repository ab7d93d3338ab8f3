"""The outbox, keys and transactional jobs in SQL, without a driver: `dramatiq_policies.sql` and Django bring the connection."""

from __future__ import annotations

__all__ = [
    "database",
    "key_table",
    "outbox",
    "outbox_rows",
    "outbox_table",
    "publisher",
    "scope",
    "session",
    "threads",
    "transactional",
    "unit_of_work",
]
