"""Call a database by SQLAlchemy: in threads, on a separate event loop, or on the application's connection.

``call(work, deadline)`` calls ``work`` with a connection on which each statement commits by itself, and returns or raises by
``deadline`` of ``time.monotonic()``.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.pool import StaticPool

from ..transactions.database import Connection
from ..transactions.session import sever
from ..transactions.threads import Call, DatabaseThreads, NoAnswer
from .connection import DriverConnection, SqlConnection

__all__ = ["AsyncMemoryCalls", "LoopCalls", "MemoryCalls", "ThreadCalls"]

T = TypeVar("T")
Work = Callable[[Connection], T]

#: Seconds that running calls get at the close of async connections, and seconds that the whole close may take.
_CALLS_END_WITHIN, _CLOSES_WITHIN = 4.0, 5.0


class ThreadCalls:
    """Calls over a sync engine, in a few threads.

    Parameters:
      engine: An engine for these calls alone.
      connections: How many calls run at once, each on a connection.
    """

    def __init__(self, engine: Engine, connections: int) -> None:
        self.engine = engine
        self._threads = DatabaseThreads("dramatiq-policies-sql", connections)
        self._is_closed = False

    def call(self, work: Work[T], deadline: float) -> T:
        return self._threads.call(lambda call: self._run(work, call), deadline)

    def _run(self, work: Work[T], call: Call) -> T:
        connection = self.engine.connect()
        try:
            call.severed_by(partial(sever, connection.connection.driver_connection))
            return work(SqlConnection(connection))
        finally:
            # The rollback of the pool may hang, too. If the next call gets a severed connection, the call takes another.
            connection.close()
            call.severed_by(None)
            if self._is_closed:
                self.engine.pool.dispose()

    def close(self) -> None:
        """Close the idle connections. A running call closes its connection at the end."""
        self._is_closed = True
        self._threads.close()
        self.engine.pool.dispose()


class LoopCalls:
    """Calls over an async engine, on a separate event loop: connections of async drivers belong to a loop.

    Parameters:
      engine: An engine for these calls alone.
      connections: How many calls run at once, each on a connection.
    """

    def __init__(self, engine: AsyncEngine, connections: int) -> None:
        self.engine = engine
        self._free = asyncio.Semaphore(connections)
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def call(self, work: Work[T], deadline: float) -> T:
        with self._lock:
            # `close` then finds the call on its loop.
            future = asyncio.run_coroutine_threadsafe(self._run(work, deadline), self._running_loop())
        try:
            # The loop gives up first, unless a driver blocks the loop.
            return future.result(max(0.0, deadline - time.monotonic()) + 1)
        except (FutureTimeout, asyncio.TimeoutError):
            future.cancel()
            raise NoAnswer("the database has not answered in time") from None

    async def _run(self, work: Work[T], deadline: float) -> T:
        return await asyncio.wait_for(self._on_connection(work), max(0.0, deadline - time.monotonic()))

    async def _on_connection(self, work: Work[T]) -> T:
        async with self._free, self.engine.connect() as connection:
            return await connection.run_sync(lambda sync: work(SqlConnection(sync)))

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(
                target=_serve, args=(self._loop,), name="dramatiq-policies-sql", daemon=True
            )
            self._thread.start()
        return self._loop

    def close(self) -> None:
        """Close the connections after the running calls, and end the thread.

        The garbage collector may be the caller, even on the loop's thread.
        """
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(self._end, loop)
            if threading.current_thread() is not thread:
                thread.join(_CLOSES_WITHIN)

    def _end(self, loop: asyncio.AbstractEventLoop) -> None:
        closing = loop.create_task(self._close())
        # A hanging server must not keep the thread.
        loop.call_later(_CLOSES_WITHIN, loop.stop)
        closing.add_done_callback(lambda _: loop.stop())

    async def _close(self) -> None:
        calls = asyncio.all_tasks() - {asyncio.current_task()}
        if calls:
            await asyncio.wait(calls, timeout=_CALLS_END_WITHIN)
        await self._close_connections()

    async def _close_connections(self) -> None:
        await self.engine.dispose()


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


class MemoryCalls:
    """Calls on the application's connection to an SQLite database in memory: another connection would see another database.

    If the application has begun a transaction on the connection, the statements join the transaction.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        # SingletonThreadPool has a connection for each thread.
        self._held: Any = SimpleNamespace() if isinstance(engine.pool, StaticPool) else threading.local()
        self._lock = threading.Lock()

    def call(self, work: Work[T], deadline: float) -> T:
        with self._lock:
            held: sa.Connection | None = getattr(self._held, "connection", None)
            if held is None or self._held.pool is not self.engine.pool:
                # Never returned: the pool would roll the application's transaction back.
                held = self._held.connection = self.engine.connect()
                self._held.pool = self.engine.pool
            return _shared(work, held)

    def close(self) -> None:
        """Leave the connection to the application."""


class AsyncMemoryCalls(LoopCalls):
    """As `MemoryCalls`, for an async engine."""

    def __init__(self, engine: AsyncEngine) -> None:
        super().__init__(engine, 1)
        self._held: AsyncConnection | None = None
        self._pool = engine.pool

    async def _on_connection(self, work: Work[T]) -> T:
        async with self._free:
            if self._held is None or self._pool is not self.engine.pool:
                self._held, self._pool = await self.engine.connect(), self.engine.pool
            return await self._held.run_sync(partial(_shared, work))

    async def _close_connections(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            await held.close()


def _shared(work: Work[T], held: sa.Connection) -> T:
    connection: Any = held.connection.dbapi_connection
    joins = held.connection.driver_connection.in_transaction  # type: ignore[union-attr]
    try:
        answer = work(DriverConnection(connection))
    except BaseException:
        if not joins:
            connection.rollback()
        raise
    if not joins:
        connection.commit()
    return answer
