"""The contract of a unit of work: one transaction of the application's database, for one run of a job.

`dramatiq_policies.sql` and `dramatiq_policies.contrib.django` implement it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ..delivery.delivery import Delivery
    from ..delivery.executor import Proceed
    from .database import Connection
    from .key_table import KeyTable
    from .outbox import Scope

__all__ = ["Finish", "UnitOfWork", "UnitOfWorkFactory"]

#: Writes what follows from a job, over the connection of its transaction and in the outbox's scope.
Finish = Callable[["Connection", "Scope"], None]


class UnitOfWork(Protocol):
    """One transaction of the application's database, for one run of a job. One worker thread uses it, once.

    Attributes:
      session: The session for the job; None without one.
    """

    @property
    def session(self) -> Any: ...

    def run(self, delivery: Delivery, proceed: Proceed) -> Any:
        """Begin, and return ``proceed(delivery)``: the job, in the outbox's scope and with its session flushed.

        The job may be interrupted. To run code as part of the job, replace ``delivery.job`` before the call of ``proceed``.
        """

    def commit(self, finish: Finish) -> None:
        """Call ``finish`` in the transaction, commit, and release the connection. Never interrupted.

        Raises:
          ConfigurationError: The job has tried to commit.
          Exception: The error of ``finish`` or of the database. `roll_back` follows.
        """

    def roll_back(self, *, interrupted: bool) -> None:
        """End the transaction without a trace, and release the connection. Never raises.

        Parameters:
          interrupted: An interrupt may have struck within a statement: don't use the connection again.
        """


class UnitOfWorkFactory(Protocol):
    """Begins the units of work of one outbox."""

    def check(self, where: str, store: KeyTable, *, is_async: bool) -> None:
        """Check that units of work are possible for an actor whose keys are in a store.

        Raises:
          ConfigurationError: They are not; the text says how to change it.
        """

    def make(self, *, is_async: bool) -> UnitOfWork:
        """Return a unit of work for one run. Does not connect."""
