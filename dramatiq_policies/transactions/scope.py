"""Find the transaction of a send, and record the rows written in the transaction."""

from __future__ import annotations

import asyncio
import itertools
import threading
from contextvars import ContextVar
from time import monotonic
from types import TracebackType
from typing import Any, Generic, TypeVar
from uuid import uuid4

from ..common.forks import after_fork
from ..errors import ConfigurationError

__all__ = ["EnteredScope", "WrittenRows", "entered_scope", "innermost", "leave_all", "leave_since"]

S = TypeVar("S")


class WrittenRows:
    """The rows written in one transaction, as far as this process knows.

    A savepoint may have rolled some rows back: the publisher reads the committed rows from the database.

    Attributes:
      owner: The owner of the leases, unique to the transaction.
      ids: The ids of the rows.
      since: The time of the first row, in monotonic seconds; None before.
    """

    __slots__ = ("ids", "owner", "since")

    def __init__(self) -> None:
        self.owner = _process.new_owner()
        self.ids: list[int] = []
        self.since: float | None = None

    def add(self, row_id: int) -> None:
        if self.since is None:
            self.since = monotonic()
        self.ids.append(row_id)

    def take_all(self) -> WrittenRows:
        """Move the rows to a new object, so that only one caller publishes them."""
        moved = WrittenRows.__new__(WrittenRows)
        moved.owner, moved.since = self.owner, self.since
        moved.ids, self.ids = self.ids, []
        return moved


class _Process:
    """Makes owners of leases, unique to this process."""

    def __init__(self) -> None:
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        self._name = uuid4().hex
        self._numbers = itertools.count(1)

    def new_owner(self) -> str:
        return f"{self._name}-{next(self._numbers)}"


_process = _Process()
_entered: ContextVar[EnteredScope[Any] | None] = ContextVar("dramatiq_policies_outbox_scope", default=None)


class EnteredScope(Generic[S]):
    """A scope entered by a thread or a task: a context manager, sync and async.

    Threads and tasks started in the block inherit the context variable, but are not part of the transaction: a scope counts only
    in the thread or task that entered the scope.

    Parameters:
      group: Identifies the outbox; an outbox and a copy in a test share the group.
    """

    def __init__(self, group: object, scope: S) -> None:
        self.group = group
        self.scope = scope
        self.entered_in: tuple[int, object] | None = None
        self.outer: EnteredScope[Any] | None = None

    def __enter__(self) -> S:
        if self.entered_in is not None:
            raise ConfigurationError("This block of the outbox is open already. Call within() for each block.")
        self.entered_in, self.outer = _thread_and_task(), _entered.get()
        _entered.set(self)
        return self.scope

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def leave(self) -> None:
        """End the block. Its end then does nothing more."""
        # Copies of the context may live on.
        self.entered_in = None
        if _entered.get() is self:
            _entered.set(self.outer)

    async def __aenter__(self) -> S:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)


def entered_scope(group: object) -> Any:
    """Return this thread's or task's innermost scope of an outbox; None outside of a scope."""
    entered = _entered.get()
    if entered is None:
        return None
    here = _thread_and_task()
    while entered is not None:
        if entered.group is group and entered.entered_in == here:
            return entered.scope
        entered = entered.outer
    return None


def innermost() -> object:
    """Return the innermost scope of any outbox, for `leave_since`."""
    return _entered.get()


def leave_since(before: Any) -> list[Any]:
    """Leave the scopes entered since ``before``, because their thread has no job any more. Returns them, the innermost first."""
    left, entered = [], _entered.get()
    while entered is not None and entered is not before:
        left.append(entered.scope)
        entered = entered.outer
    _entered.set(before)
    return left


def leave_all() -> None:
    """Leave the scopes of this thread: an interrupt may have struck between the begin or end of a block and its ``with``."""
    leave_since(None)


def _thread_and_task() -> tuple[int, object]:
    """Return the thread and the task that run now."""
    try:
        task: object = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident(), task
