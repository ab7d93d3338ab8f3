"""The transaction of a transactional job: an ``atomic`` block."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from django.db import DatabaseError, connections, transaction

from ...common.safe_logger import SafeLogger
from ...errors import ConfigurationError
from ...transactions.database import has_rolled_back
from .connections import (
    close_interrupted_connections,
    in_atomic_of_the_app,
    is_of_a_test_case,
    leave_innermost_block,
)
from .database import DjangoConnection
from .outbox_scope import AtomicScope, publish
from .store import DjangoStore

if TYPE_CHECKING:
    from ...delivery.delivery import Delivery
    from ...delivery.executor import Proceed
    from ...transactions.key_table import KeyTable
    from ...transactions.outbox import Outbox
    from ...transactions.unit_of_work import Finish, UnitOfWork

__all__ = ["DjangoUnitOfWorkFactory"]

logger = SafeLogger("dramatiq_policies.django")

_COMMITTED = (
    "A job with transactional=True must not commit, roll back or set autocommit: the worker commits after the job has returned, "
    "together with the completion of its key and with its messages. Remove the call, or use atomic() for a savepoint."
)
_CLOSED = (
    "A job with transactional=True must not close the connection to database {alias!r}: the worker commits over it."
)
_OPEN = "A job with transactional=True has left an atomic block open on database {alias!r}. End each block that the job begins."
_INSIDE = (
    "A job with transactional=True begins inside of a transaction on database {alias!r}, so that its commit would not be the "
    "job's. Remove the middleware that begins the transaction, or AUTOCOMMIT=False from DATABASES."
)


class DjangoUnitOfWorkFactory:
    """Makes the transactions of transactional jobs.

    Parameters:
      outbox: The outbox.
      using: The alias of the database.
    """

    def __init__(self, outbox: Outbox, using: str) -> None:
        self.outbox = outbox
        self.using = using

    def check(self, where: str, store: KeyTable, *, is_async: bool) -> None:
        """Check that an actor with keys in ``store`` can have units of work.

        Raises:
          ConfigurationError: The actor can't.
        """
        if not isinstance(store, DjangoStore) or store.using != self.using:
            raise ConfigurationError(
                f"{where}: transactional=True needs keys and outbox in one database. Pass the same alias to both: "
                f"DjangoOutbox({self.using!r}) and Idempotency(DjangoStore({self.using!r}))."
            )
        if is_async:
            raise ConfigurationError(
                f"{where}: transactional=True needs a sync actor, because Django has no async transactions. Write def, not async def."
            )

    def make(self, *, is_async: bool) -> UnitOfWork:
        """Return a unit of work for one run. Does not connect."""
        return DjangoUnitOfWork(self.outbox, self.using)


class DjangoUnitOfWork:
    """The transaction of one job, on the connection of the job's thread."""

    session = None

    def __init__(self, outbox: Outbox, using: str) -> None:
        self._outbox = outbox
        self._using = using
        self._connection: Any = None
        self._block: Any = None
        #: Why the worker must not commit: the job has tried to commit, or the server has rolled the transaction back.
        self._refused: Exception | None = None

    def run(self, delivery: Delivery, proceed: Proceed) -> Any:
        self._connection = connection = connections[self._using]
        if in_atomic_of_the_app(connection):
            raise self._error(_INSIDE)
        if not connection.in_atomic_block:
            connection.close_if_unusable_or_obsolete()
            if not connection.get_autocommit():
                raise self._error(_INSIDE)
        self._block = self._begin(connection)
        # Django calls this hook to refuse a commit inside of a block.
        connection.validate_no_atomic_block = self._refuse
        connection.execute_wrappers.append(self._execute)
        try:
            return proceed(delivery)
        finally:
            connection.execute_wrappers.remove(self._execute)
            del connection.validate_no_atomic_block

    def _begin(self, connection: Any) -> Any:
        block = transaction.atomic(using=self._using)
        mode = getattr(connection, "transaction_mode", None)
        # The transaction will write. On SQLite a transaction that reads first fails if another transaction writes meanwhile. From
        # Django 5.1 on.
        if connection.vendor == "sqlite":
            connection.transaction_mode = "IMMEDIATE"
        try:
            block.__enter__()
        finally:
            if connection.vendor == "sqlite":
                connection.transaction_mode = mode
        return block

    def _refuse(self) -> None:
        self._refused = refused = self._error(_COMMITTED)
        raise refused

    def _execute(self, execute: Callable[..., Any], *given: Any) -> Any:
        try:
            return execute(*given)
        except DatabaseError as error:
            if has_rolled_back(error):
                self._refused = error
            raise

    def commit(self, finish: Finish) -> None:
        connection = self._connection
        # The job may have caught the error.
        if self._refused is not None:
            raise self._refused
        if connection.closed_in_transaction:
            raise self._error(_CLOSED)
        if connection.atomic_blocks[-1] is not self._block:
            raise self._error(_OPEN)
        scope, adapter = AtomicScope(connection), DjangoConnection(connection)
        finish(adapter, scope)
        block, self._block = self._block, None
        if is_of_a_test_case(connection):
            block.__exit__(None, None, None)
            # In a TestCase no commit follows to publish the rows.
            publish(self._outbox, scope.written(self._outbox), self._using)
            return
        # Django would raise the error of a callback, although the commit has taken effect.
        callbacks, connection.run_on_commit = connection.run_on_commit, []
        driver_connection = connection.connection
        try:
            block.__exit__(None, None, None)
        except Exception as error:
            # After a failed COMMIT Django rolls back. If the rollback fails, too, Django connects again.
            if connection.connection is not driver_connection or not connection.is_usable():
                error.connection_invalidated = True  # type: ignore[attr-defined]
            raise
        for _, callback, _ in callbacks:
            try:
                callback()
            except Exception:
                logger.exception(
                    "The on_commit callback %r of a job raised an error. The job has committed and succeeded.", callback
                )

    def roll_back(self, *, interrupted: bool) -> None:
        connection, block = self._connection, self._block
        if connection is None:
            return
        try:
            if interrupted:
                close_interrupted_connections()
            if block is not None and any(one is connection for one in connections.all(initialized_only=True)):
                self._leave(connection, block)
        except Exception:
            logger.exception(
                "The transaction of a job could not be rolled back. The worker drops the connection, and the database rolls back."
            )
            close_interrupted_connections()

    def _leave(self, connection: Any, block: object) -> None:
        """Roll back the block, and blocks left open by the job."""
        while block in connection.atomic_blocks:
            leave_innermost_block(connection)

    def _error(self, text: str) -> ConfigurationError:
        return ConfigurationError(text.format(alias=self._using))
