"""An idempotency store in a database, by SQLAlchemy."""

from __future__ import annotations

from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from ..transactions.key_table import DEFAULT_NAMESPACE, KeyTable
from .connection import checked_engine
from .database import SqlDatabase
from .tables import HOW_TO_CREATE

__all__ = ["SqlStore"]


class SqlStore(KeyTable):
    """Keeps keys in a table of your database: PostgreSQL, MariaDB, MySQL or SQLite.

    Example::

        engine = create_engine("postgresql+psycopg://shop@db/shop")
        create_tables(engine)
        install(broker, idempotency=Idempotency(SqlStore(engine, namespace="billing")))

    With an outbox on the same database, the store also serves actors with ``transactional=True``. Otherwise prefer
    `RedisStore`: a key on Redis is cheaper.

    A process uses at most four connections (SQLite: one) beside the engine's pool, for any number of threads. A forked process makes
    new connections, so you may make the engine before the fork.

    A call raises after at most five seconds, and waits at most one second for a lock. The store also sets these timeouts in the
    server session. Behind a pooler like PgBouncer, which shares sessions, give the engine a ``NullPool``: the store then sets no
    timeouts. A silent host can hold a connection of the store for the driver's connect timeout. Set a short connect timeout:
    ``connect_args={"connect_timeout": 5}`` for psycopg and PyMySQL, ``{"timeout": 5}`` for asyncpg.

    Writers delete expired keys: up to 500 for every 100 writes of a process.

    Parameters:
      engine: An ``Engine`` or an ``AsyncEngine``.
      namespace: Separates the keys of services that share the database. Default: ``"idem"``. With the default, the virtual host (or
        namespace) of the broker and the queue of the actor keep the keys of services apart. Keys are digests, so the database does
        not see the arguments of your jobs.

    Raises:
      ConfigurationError: An argument is invalid.
    """

    how_to_create = HOW_TO_CREATE

    def __init__(self, engine: Engine | AsyncEngine, *, namespace: str = DEFAULT_NAMESPACE) -> None:
        self.engine = checked_engine("SqlStore", engine)
        database = SqlDatabase(self.engine)
        self._in_memory = database.in_memory
        super().__init__(database, namespace)

    def warnings(self) -> list[str]:
        found = super().warnings()
        if self._in_memory:
            found.append("The idempotency store is an SQLite database in memory: other processes see no keys.")
        return found
