"""The transaction of a Session, an AsyncSession or a Connection as a scope of the outbox.

Rows are inserted at once, over the same connection: the database removes the rows at a rollback, also of a savepoint. With an
async engine no statement can run inside of a plain function such as ``send``: the rows wait in the session until the commit, and
this module removes the rows of a savepoint at a rollback. Below SQLAlchemy (in a listener or in ``run_sync``) a statement can run.
"""

from __future__ import annotations

import asyncio
import gc
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary, ref

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Engine, Transaction
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import concurrency

from ..errors import ConfigurationError
from ..transactions.outbox import Outbox, Scope
from ..transactions.outbox_table import NewRow
from ..transactions.publisher import Ticket
from ..transactions.scope import WrittenRows
from .connection import SqlConnection, isolation_level_of
from .tables import outbox as table

__all__ = ["ConnectionScope", "SessionScope", "is_autocommit"]

_KEY = "dramatiq_policies_outbox"
#: Awaits in the sync code below an async engine. Named ``await_only`` before SQLAlchemy 2.1.
_await: Callable[[Awaitable[Any]], Any] = getattr(concurrency, "await_", None) or concurrency.await_only


def _runs_in_sqlalchemy() -> bool:
    from greenlet import getcurrent  # type: ignore[import-untyped]

    return type(getcurrent()).__name__ == "_AsyncIoGreenlet"


#: Tells whether an async engine can run a statement here. Early releases of SQLAlchemy 2.0 have no such function.
_in_greenlet: Callable[[], bool] = getattr(concurrency, "in_greenlet", _runs_in_sqlalchemy)


class SessionScope(Scope):
    """The transaction of a Session."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def abandon(self) -> None:
        if self.session.get_bind(clause=table.insert()).dialect.is_async:
            # Only its event loop could close the connection; the garbage collector does.
            gc.collect()
        else:
            self.session.close()

    def add(self, outbox: Outbox, row: NewRow) -> None:
        watches: dict[Outbox, _SessionWatch] = self.session.info.setdefault(_KEY, {})
        watch = watches.get(outbox)
        if watch is None:
            watch = watches[outbox] = _SessionWatch(outbox)
        watch.add(self.session, row)


class ConnectionScope(Scope):
    """The transaction of a Connection."""

    def __init__(self, connection: sa.Connection) -> None:
        self.connection = connection

    def abandon(self) -> None:
        self.connection.close()

    def add(self, outbox: Outbox, row: NewRow) -> None:
        written = _written_on(self.connection, outbox) or WrittenRows()
        outbox.insert(SqlConnection(self.connection), row, written)
        # After the first statement: the statement may have begun the transaction.
        _watch(self.connection, outbox, written)


class _SessionWatch:
    """The rows of one session for one outbox, and the session's events."""

    def __init__(self, outbox: Outbox) -> None:
        self.outbox = outbox
        self.written = WrittenRows()
        self.connection: sa.Connection | None = None
        self.is_async = False
        self.ticket: Ticket | None = None
        #: Rows that wait for the commit, each with the innermost savepoint at the send.
        self.waiting: deque[tuple[SessionTransaction | None, NewRow]] = deque()
        #: The innermost savepoint, if committed and about to end.
        self.released: SessionTransaction | None = None
        #: The number of the session's transactions about to be committed.
        self.committing = 0
        self.heard: set[str] = set()

    def add(self, session: Session, row: NewRow) -> None:
        self.is_async = session.get_bind(clause=table.insert()).dialect.is_async
        if self.is_async and not _in_greenlet():
            self._keep(session, row)
            return
        # Earlier messages first, unless one of them may be outside of the savepoint.
        if self.waiting and not session.in_nested_transaction():
            self._insert_waiting(session)
        self._insert(session, [row])

    def _keep(self, session: Session, row: NewRow) -> None:
        """Keep a row until the commit."""
        # Otherwise the session may have no transaction, and the commit would do nothing.
        if not session.in_transaction():
            if not session.autobegin:
                raise InvalidRequestError(
                    "Autobegin is disabled on this Session: call session.begin() before you send."
                )
            session.begin()
        self._listen(session, "before_commit", "after_commit", "after_transaction_end")
        self.waiting.append((session.get_nested_transaction(), row))

    def _insert(self, session: Session, rows: Iterable[NewRow]) -> None:
        self.connection = connection = session.connection(bind_arguments={"clause": table.insert()})
        if is_autocommit(connection):
            raise ConfigurationError(
                "The session's connection has the isolation level AUTOCOMMIT, and so no transaction for the outbox."
            )
        self._listen(session, "after_commit", "after_transaction_end")
        for row in rows:
            self.outbox.insert(SqlConnection(connection), row, self.written)

    def _listen(self, session: Session, *names: str) -> None:
        """Listen to events of the session, as late as possible: SQLAlchemy takes no listener of an event that it is announcing."""
        for name in names:
            if name not in self.heard:
                self.heard.add(name)
                event.listen(session, name, getattr(self, name))

    def _insert_waiting(self, session: Session) -> None:
        if self.waiting:
            self._insert(session, self._leaving())

    def _leaving(self) -> Iterator[NewRow]:
        while self.waiting:
            yield self.waiting[0][1]
            # After the insertion: the application may catch an error, and commit once more.
            self.waiting.popleft()

    # The session's events.

    def before_commit(self, session: Session) -> None:
        self.committing += 1
        # Also called at the release of a savepoint: the rows wait, since an outer savepoint may still be rolled back.
        if not session.in_nested_transaction():
            self._insert_waiting(session)

    def after_commit(self, session: Session) -> None:
        self.committing = max(0, self.committing - 1)
        if session.in_nested_transaction():
            self.released = session.get_nested_transaction()
            return
        connection = self.connection
        if connection is None:
            return
        if not connection.in_transaction():
            if self.is_async and self.outbox.is_inline:
                # On SQLite, another task of the loop may have the lock that the publication waits for.
                _await(asyncio.to_thread(self.outbox.after_commit, self.written))
            else:
                self.ticket = self.outbox.after_commit(self.written)
        elif self.outbox.is_inline:
            # A test has begun the transaction outside of the session, and never commits.
            self.outbox.after_commit(self.written, SqlConnection(connection))
        else:
            _watch(connection, self.outbox, self.written.take_all())

    def after_transaction_end(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.nested:
            self._end_savepoint(session, transaction)
        elif transaction.parent is None:
            self._hand_over(session)
            ticket = self.ticket
            self.written, self.connection, self.ticket, self.waiting = WrittenRows(), None, None, deque()
            self.released, self.committing = None, 0
            _wait(self.outbox, ticket, is_async=self.is_async)

    def _hand_over(self, session: Session) -> None:
        """Insert waiting rows over a connection of the application whose transaction goes on without the session."""
        bind = session.get_bind(clause=table.insert()) if self.waiting else None
        if not isinstance(bind, sa.Connection) or not bind.in_transaction():
            return
        mode = session.join_transaction_mode
        if mode == "create_savepoint" or (mode == "conditional_savepoint" and bind.in_nested_transaction()):
            # The session has rolled its savepoint back.
            return
        try:
            for row in self._leaving():
                self.outbox.insert(SqlConnection(bind), row, self.written)
        except DBAPIError:
            if bind.dialect.name != "postgresql":
                raise
            # The application's error has ended the transaction: a commit would roll back. That error is the one to raise.
            return
        _watch(bind, self.outbox, self.written)

    def _end_savepoint(self, session: Session, savepoint: SessionTransaction) -> None:
        outer = session.get_nested_transaction()
        if self.released is savepoint:
            self.waiting = deque((outer if at is savepoint else at, row) for at, row in self.waiting)
            if outer is None and self.committing:
                # The commit of the session releases its open savepoints, and announces nothing after them.
                self._insert_waiting(session)
        else:
            self.waiting = deque((at, row) for at, row in self.waiting if at is not savepoint)
        self.released = None


#: The rows written in the transactions of connections.
_transactions: WeakKeyDictionary[Transaction, list[tuple[Outbox, WrittenRows]]] = WeakKeyDictionary()


def _written_on(connection: sa.Connection, outbox: Outbox) -> WrittenRows | None:
    transaction = connection.get_transaction()
    entries = [] if transaction is None else _transactions.get(transaction, [])
    return next((written for other, written in entries if other is outbox), None)


def _watch(connection: sa.Connection, outbox: Outbox, written: WrittenRows) -> None:
    """Publish rows after the commit of the connection's transaction."""
    transaction = connection.get_transaction()
    assert transaction is not None
    entries = _transactions.setdefault(transaction, [])
    if not any(other is written for _, other in entries):
        entries.append((outbox, written))
    if _KEY not in vars(connection):
        _intercept_commit(connection)


def _intercept_commit(connection: Any) -> None:
    """Call `_committed` after each COMMIT of a connection.

    SQLAlchemy has an event before the COMMIT and none after: a failed commit must publish nothing.
    """
    # The connection has the functions: a strong reference would be a cycle.
    intercepted = ref(connection)

    def followed(commit: Callable[..., None]) -> Callable[..., None]:
        def commit_impl(*args: Any) -> None:
            committing: Any = intercepted()
            transaction = committing.get_transaction()
            commit(committing, *args)
            if transaction is not None:
                _committed(transaction, is_async=committing.dialect.is_async)

        return commit_impl

    names = ("_commit_impl", "_commit_twophase_impl")
    vars(connection).update({_KEY: True, **{name: followed(getattr(type(connection), name)) for name in names}})


def _committed(transaction: Transaction, *, is_async: bool) -> None:
    tickets = [(outbox, outbox.after_commit(written)) for outbox, written in _transactions.pop(transaction, [])]
    for outbox, ticket in tickets:
        _wait(outbox, ticket, is_async=is_async)


def _wait(outbox: Outbox, ticket: Ticket | None, *, is_async: bool) -> None:
    """Wait for the publication of rows, at most for the outbox's ``wait``. Other tasks of an event loop run meanwhile."""
    if ticket is None:
        return
    if not is_async:
        outbox.wait_for(ticket)
    elif not outbox.publisher.is_stuck():
        _await(_wait_in_loop(ticket, outbox.wait / 1_000))


async def _wait_in_loop(ticket: Ticket, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def set_result() -> None:
        if not future.done():
            future.set_result(None)

    def done() -> None:
        # The loop may have ended.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(set_result)

    ticket.call_when_done(done)
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(future, seconds)


def is_autocommit(bind: Engine | sa.Connection) -> bool:
    """Return whether each statement of an engine or connection commits by itself."""
    return isolation_level_of(bind) == "AUTOCOMMIT"
