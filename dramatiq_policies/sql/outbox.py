"""`SqlOutbox`: send messages in a transaction of SQLAlchemy."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from ..errors import ConfigurationError
from ..transactions.database import Database
from ..transactions.outbox import Outbox, Scope
from ..transactions.scope import EnteredScope
from ..transactions.transactional import TransactionalJobs
from .connection import checked_engine, sync_engine_of
from .database import SqlDatabase
from .scopes import ConnectionScope, SessionScope, is_autocommit
from .tables import HOW_TO_CREATE
from .tables import outbox as table
from .unit_of_work import SqlUnitOfWorkFactory

if TYPE_CHECKING:
    from ..delivery.broker_state import BrokerState

__all__ = ["SqlOutbox"]

#: How many connections the outbox of a process uses: the publisher's and the relay's.
_CONNECTIONS = 2
_HERE = frozenset({None, "", "localhost", "127.0.0.1", "::1"})
_PORTS = {"postgresql": 5432, "mysql": 3306}


class SqlOutbox(Outbox):
    """Send messages within a database transaction: no message without its row, no row without its message::

        engine = create_engine("postgresql+psycopg://localhost/shop")
        outbox = SqlOutbox(engine)
        install(broker, outbox=outbox)

        with Session(engine) as session, session.begin(), outbox.within(session):
            session.add(order)
            send_confirmation.send(order.id)                    # a row, in this transaction

    A message that is sent inside of `within` is a row of the transaction. After the commit this process publishes the message
    at once. If the process dies or the broker is down, the relay of a worker publishes the message later. After a rollback, also
    of a savepoint, the message is never published.

    A message is published twice only if a process or its connection is lost, or the process stands still for longer than
    ``lease``, between the publication and the deletion of the row. Both have the same message id, so an actor with
    ``idempotent=True`` runs once. A delay counts from the send. ``before_enqueue`` hooks run at the send, ``after_enqueue`` hooks
    at the publication. An actor with ``outbox=False`` is always sent at once.

    Parameters:
      engine: A sync or async engine of PostgreSQL, MariaDB, MySQL or SQLite. The outbox uses at most two connections of its own
        in each process, beside the engine's pool.
      wait: How long the caller of a commit waits until its messages are published, in milliseconds or as a ``timedelta``.
        With an AsyncSession other tasks of the event loop run meanwhile. With 0 the commit does not wait, and the relay publishes
        all messages. Default 1,000.
      lease: How long a row belongs to the process that publishes it, in milliseconds or as a ``timedelta``. If that process
        dies, a relay publishes the row within this time and five seconds. At least 1,000; default 30,000.
      relay: Whether each worker process runs a relay in a thread. Default True. With False run ``dramatiq-policies outbox relay``.
      namespace: Only relays of the same namespace publish a row. Services that share a database need a namespace each. At most
        64 characters; default ``""``.

    Raises:
      ConfigurationError: An argument is invalid.
    """

    how_to_create = HOW_TO_CREATE

    def __init__(
        self,
        engine: Engine | AsyncEngine,
        *,
        wait: int | timedelta = 1_000,
        lease: int | timedelta = 30_000,
        relay: bool = True,
        namespace: str = "",
    ) -> None:
        super().__init__("SqlOutbox", wait=wait, lease=lease, relay=relay, namespace=namespace)
        self.engine = checked_engine("SqlOutbox", engine)
        # Here, not at the first use: in a forked child it also resets the engine.
        self._database = SqlDatabase(self.engine, connections=_CONNECTIONS)

    def make_database(self) -> Database:
        return self._database

    def attach(self, state: BrokerState) -> None:
        super().attach(state)
        state.transactional_jobs = TransactionalJobs(
            state, self, SqlUnitOfWorkFactory(self.engine, self.within, self.is_same_database)
        )

    def is_same_database(self, engine: Engine | AsyncEngine) -> bool:
        """Return whether another engine is of the outbox's database."""
        own, other = sync_engine_of(self.engine), sync_engine_of(engine)
        return other is own or other.pool is own.pool or _address(other) == _address(own)

    def within(self, session: Session | AsyncSession | sa.Connection) -> EnteredScope[Scope]:
        """Send messages in the transaction of a session or connection::

            with Session(engine) as session, session.begin(), outbox.within(session):
                send_confirmation.send(order.id)

            async with AsyncSession(engine) as session, session.begin(), outbox.within(session):
                send_confirmation.send(order.id)

        `within` neither begins nor ends a transaction. Only the thread or task of the block is inside: other threads, and tasks
        started in the block, send at once.

        Parameters:
          session: A Session, an AsyncSession or a Connection.

        Raises:
          ConfigurationError: The value is none of these, or uses another database or isolation level AUTOCOMMIT; or the outbox
            is on no broker.
        """
        where = "SqlOutbox.within()"
        if self.attached_to is None:
            raise ConfigurationError("This SqlOutbox is on no broker. Call install(broker, outbox=outbox).")
        given: Any = session
        if isinstance(given, (scoped_session, async_scoped_session)):
            given = given()
        if isinstance(given, AsyncSession):
            given = given.sync_session
        scope: Scope
        if isinstance(given, Session):
            bind = _bind_of(given)
            scope = SessionScope(given)
        elif isinstance(given, sa.Connection):
            bind = given
            scope = ConnectionScope(given)
        else:
            raise ConfigurationError.of_option(
                where, "session", "a Session, an AsyncSession or a Connection", session, secret=True
            )
        if is_autocommit(bind):
            raise ConfigurationError(
                f"{where}: the isolation level AUTOCOMMIT has no transactions. Use a connection with another level."
            )
        self._check_database(where, bind.engine)
        return EnteredScope(self.group, scope)

    def _check_database(self, where: str, engine: Engine) -> None:
        if not self.is_same_database(engine):
            own = sync_engine_of(self.engine)
            raise ConfigurationError(
                f"{where}: the session is on another database ({_shown(engine)}) than the outbox ({_shown(own)}). "
                "Rows of the outbox must be committed with yours: make a SqlOutbox for each database."
            )


def _bind_of(session: Session) -> Engine | sa.Connection:
    """Return the engine or connection over which the session writes the outbox's table."""
    try:
        return session.get_bind(clause=table.insert())
    except UnboundExecutionError as error:
        raise ConfigurationError(
            "SqlOutbox.within(): the session has no engine for the table of the outbox. "
            f"Bind it: Session(engine), or session.bind_table(metadata.tables[{table.name!r}], engine)."
        ) from error


def _address(engine: Engine) -> tuple[object, ...]:
    """Return what tells one database from another."""
    url, name = engine.url, engine.dialect.name
    name = "mysql" if name == "mariadb" else name
    if name == "sqlite":
        path = url.database
        in_memory = not path or path == ":memory:" or "mode=memory" in path
        # Each engine in memory has a database of its own.
        return (name, id(engine.pool)) if in_memory else (name, str(Path(path or "").resolve()))
    host = url.host or url.query.get("host") or None
    return (name, None if host in _HERE else host, url.port or _PORTS.get(name), url.database)


def _shown(engine: Engine) -> str:
    url = engine.url
    place = f"{url.host or 'localhost'}{f':{url.port}' if url.port else ''}/" if engine.dialect.name != "sqlite" else ""
    return f"{engine.dialect.name} {place}{url.database or ''}"
