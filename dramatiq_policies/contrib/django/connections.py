"""Close Django's connections of a thread after an interrupt of its job."""

from __future__ import annotations

from typing import Any

from django.db import connections

from ...common.safe_logger import SafeLogger

__all__ = ["close_interrupted_connections", "in_atomic_of_the_app", "is_of_a_test_case", "leave_innermost_block"]

logger = SafeLogger("dramatiq_policies.django")


def close_interrupted_connections() -> None:
    """Close the connections of this thread. Django opens new ones at the next query.

    An interrupt strikes anywhere, also between a query and its answer, or while a transaction ends. So the connection and its
    state are gone together. A connection with the transaction of a ``TestCase`` stays, and so does a database in memory.
    """
    for connection in connections.all(initialized_only=True):
        if is_of_a_test_case(connection):
            continue
        try:
            connection.close()
        except Exception as error:  # The driver's: the connection is lost in any case.
            logger.warning("A connection to database %r did not close cleanly: %s", connection.alias, error)
        if connection.connection is None or connection.closed_in_transaction:
            del connections[connection.alias]


def is_of_a_test_case(connection: Any) -> bool:
    """Whether a ``TestCase`` has begun the transaction of a connection."""
    return any(block._from_testcase for block in connection.atomic_blocks)  # noqa: SLF001


def in_atomic_of_the_app(connection: Any) -> bool:
    """Whether a connection is inside of an ``atomic`` block. The blocks of a ``TestCase`` don't count."""
    return any(not block._from_testcase for block in connection.atomic_blocks)  # noqa: SLF001


def leave_innermost_block(connection: Any) -> None:
    """Roll back the innermost ``atomic`` block of a connection, and end the block."""
    connection.atomic_blocks[-1].__exit__(RuntimeError, RuntimeError(), None)
