"""`DjangoOutbox`: send messages in the transaction of an ``atomic`` block."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from django.db import connections

from ...transactions.outbox import Outbox, Scope
from ...transactions.transactional import TransactionalJobs
from .connections import in_atomic_of_the_app, leave_innermost_block
from .database import DjangoDatabase, checked_using, how_to_migrate
from .outbox_scope import AtomicScope
from .unit_of_work import DjangoUnitOfWorkFactory

if TYPE_CHECKING:
    from ...delivery.broker_state import BrokerState
    from ...transactions.database import Database

__all__ = ["DjangoOutbox"]

#: How many connections the outbox of a process uses: the publisher's and the relay's.
_CONNECTIONS = 2


class DjangoOutbox(Outbox):
    """Send messages with their transaction: no message without its row, no row without its message::

        INSTALLED_APPS = ["django_dramatiq", "dramatiq_policies.contrib.django", ...]      # and manage.py migrate
        DRAMATIQ_BROKER = {..., "MIDDLEWARE": [..., "dramatiq_policies.contrib.django.DjangoOutbox"]}

        @transaction.atomic
        def place_order(email):
            order = Order.objects.create(email=email)
            send_confirmation.send(order.pk)                    # a row, in this transaction

    A message that is sent inside of ``atomic(using=…)`` is a row of the transaction, also with ``ATOMIC_REQUESTS``. After the
    commit this process publishes the message at once. If the process dies or the broker is down, the relay of a worker publishes
    the message later. After a rollback, also of a savepoint, the message is never published. Outside of ``atomic`` a message goes
    to the broker at once. An actor with ``outbox=False`` is always sent at once.

    In a ``TestCase`` the block around the test does not count: a message that is sent inside of ``atomic`` of your code is
    published by ``captureOnCommitCallbacks(execute=True)``, as every ``on_commit`` callback.

    A message is published twice only if a process or its connection is lost, or the process stands still for longer than
    ``lease``, between the publication and the deletion of the row. Both have the same message id, so an actor with
    ``idempotent=True`` runs once. A delay counts from the send. ``before_enqueue`` hooks run at the send, ``after_enqueue`` hooks
    at the publication.

    Parameters:
      using: The alias of the database: PostgreSQL, MariaDB, MySQL or SQLite. Default ``"default"``. The outbox uses at most two
        connections of its own in each process.
      wait: How long the caller of a commit waits until its messages are published, in milliseconds or as a ``timedelta``. With 0
        the commit does not wait, and the relay publishes all messages. Default 1,000.
      lease: How long a row belongs to the publishing process, in milliseconds or as a ``timedelta``. If the process dies, a
        relay publishes the row within this time and five seconds. At least 1,000; default 30,000.
      relay: Whether each worker process runs a relay in a thread. Default True. With False run
        ``manage.py policies outbox relay``.
      namespace: Only relays of the same namespace publish a row. With a shared database, give each service its own namespace. At most
        64 characters; default ``""``.

    Raises:
      ConfigurationError: An argument is invalid.
    """

    def __init__(
        self,
        using: str = "default",
        *,
        wait: int | timedelta = 1_000,
        lease: int | timedelta = 30_000,
        relay: bool = True,
        namespace: str = "",
    ) -> None:
        super().__init__("DjangoOutbox", wait=wait, lease=lease, relay=relay, namespace=namespace)
        self.using = checked_using("DjangoOutbox", using)
        self.how_to_create = how_to_migrate(self.using)

    def attach(self, state: BrokerState) -> None:
        super().attach(state)
        state.transactional_jobs = TransactionalJobs(state, self, DjangoUnitOfWorkFactory(self, self.using))

    def make_database(self) -> Database:
        return DjangoDatabase(self.using, limit=_CONNECTIONS)

    def before_job(self) -> tuple[object, int]:
        connection = self._connection()
        return super().before_job(), 0 if connection is None else len(connection.atomic_blocks)

    def forget_job(self, before: Any) -> None:
        inner, blocks = before
        super().forget_job(inner)
        connection = self._connection()
        while connection is not None and len(connection.atomic_blocks) > blocks:
            leave_innermost_block(connection)

    def _connection(self) -> Any:
        """Return this thread's connection to the outbox's database, or None."""
        # Not `connections[using]`, which would make a connection where none is needed.
        return next((one for one in connections.all(initialized_only=True) if one.alias == self.using), None)

    def find_scope(self) -> Scope | None:
        """Return the ``atomic`` block of this thread; None outside of one."""
        connection = self._connection()
        return AtomicScope(connection) if connection is not None and in_atomic_of_the_app(connection) else None
