"""`Outbox`: the middleware that writes messages as rows of the caller's transaction."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from dramatiq import Message
from dramatiq.common import q_name

from .._dramatiq import kind_of
from ..brokers import batch_of
from ..brokers.batch import Batch
from ..common.durations import CENTURY_MS
from ..common.forks import after_fork
from ..common.safe_logger import SafeLogger
from ..delivery.direct import is_direct
from ..errors import ConfigurationError, checked_duration
from ..interrupts.listeners import after_each_interrupt
from ..middleware.background_thread import BackgroundThread
from ..middleware.base import PolicyMiddleware, arrangement_of
from .database import Connection, Database, is_missing_table
from .outbox_rows import OutboxRows, OutboxStats
from .outbox_table import MEMBER, MESSAGE, NewRow, OutboxTable
from .publication import Publication, RunWork
from .publisher import Publisher, Ticket
from .relay import Relay
from .scope import WrittenRows, entered_scope, innermost, leave_all, leave_since

if TYPE_CHECKING:
    from dramatiq import Worker
    from dramatiq.broker import Broker
    from typing_extensions import Self

    from ..delivery.broker_state import BrokerState

__all__ = ["Outbox", "Scope", "outbox_on"]

logger = SafeLogger("dramatiq_policies.outbox")

#: Seconds for which a worker waits for the relay at shutdown.
_SHUTDOWN = 5.0


class Outbox(PolicyMiddleware):
    """Base class of `SqlOutbox` and `DjangoOutbox`.

    Parameters:
      where: The name of the class, for errors.
      wait, lease, relay, namespace: See `SqlOutbox`.
    """

    #: The advice for a missing table.
    how_to_create = ""

    def __init__(
        self, where: str, *, wait: int | timedelta, lease: int | timedelta, relay: bool, namespace: str
    ) -> None:
        self.wait = checked_duration(where, "wait", wait, most=CENTURY_MS)
        self.lease = checked_duration(where, "lease", lease, least=1_000, most=CENTURY_MS)
        if relay not in (True, False):
            raise ConfigurationError.of_option(where, "relay", "True or False", relay)
        checked: Any = namespace
        if not isinstance(checked, str) or len(checked) > 64:
            raise ConfigurationError.of_option(where, "namespace", "a str of at most 64 characters", namespace)
        self.relay = relay
        self.namespace = namespace
        #: Shared with copies of this outbox for tests.
        self.group = object()
        self._reset()
        after_fork(self)

    def _reset(self) -> None:
        for name in ("database", "table", "rows", "batch", "publication", "publisher", "_relay"):
            vars(self).pop(name, None)
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Start without a relay: the thread is the parent's."""
        self._thread = BackgroundThread("outbox", self.run_relay)

    # For subclasses.

    def make_database(self) -> Database:
        """Return the library's own connections to the database."""
        raise NotImplementedError

    def find_scope(self) -> Scope | None:
        """Return the open transaction of this thread or task; None outside of a transaction."""
        scope: Scope | None = entered_scope(self.group)
        return scope

    # The parts, made at first use.

    @cached_property
    def database(self) -> Database:
        """The library's own connections to the database."""
        return self.make_database()

    @cached_property
    def table(self) -> OutboxTable:
        """The rows, to insert, lease and delete."""
        return OutboxTable(self.namespace, self.lease, self.database.dialect)

    @cached_property
    def rows(self) -> OutboxRows:
        """The waiting rows, for operators."""
        return OutboxRows(self.namespace, self.database.dialect)

    @cached_property
    def batch(self) -> Batch:
        """Publishes on the broker."""
        assert self.attached_to is not None
        return batch_of(self.attached_to)

    @cached_property
    def publication(self) -> Publication:
        """Publishes rows."""
        return Publication(self.table, self.batch)

    @cached_property
    def publisher(self) -> Publisher:
        """The thread that publishes this process's committed messages."""
        return Publisher(self.database, self.publication, self.wait / 1_000)

    @property
    def is_inline(self) -> bool:
        """Whether the committing thread publishes: on a StubBroker, in tests."""
        return self.attached_to is not None and kind_of(self.attached_to.broker) == "stub"

    # On the broker.

    def attach(self, state: BrokerState) -> None:
        broker = state.broker
        enqueue_now = broker.enqueue

        @functools.wraps(enqueue_now)
        def enqueue(message: Message[Any], *, delay: int | None = None) -> Message[Any]:
            scope = self.scope_of(message)
            if scope is None:
                return enqueue_now(message, delay=delay)
            return self.add(scope, message, delay)

        broker.enqueue = enqueue  # type: ignore[method-assign]
        state.read_outbox = self._stats
        after_each_interrupt(leave_all)

    def _stats(self) -> OutboxStats:
        return self.database.run(self.rows.stats)

    def for_stub(self) -> Self:
        stub = super().for_stub()
        stub.namespace = uuid4().hex
        stub._reset()  # noqa: SLF001 - of our own class
        after_fork(stub)
        return stub

    def scope_of(self, message: Message[Any]) -> Scope | None:
        """Return the transaction in which a send of this message here becomes a row; None for a send at once."""
        scope = self.find_scope()
        return None if scope is None or is_direct() or self._is_exempt(message) else scope

    def _is_exempt(self, message: Message[Any]) -> bool:
        assert self.attached_to is not None
        actor = self.attached_to.broker.actors.get(message.actor_name)
        return actor is not None and actor.options.get("outbox") is False

    # Writing.

    def add(self, scope: Scope, message: Message[Any], delay: int | None = None) -> Message[Any]:
        """Write a message in a transaction, also with ``outbox=False``. Returns the final message.

        ``before_enqueue`` hooks run now, ``after_enqueue`` hooks when the message is published.
        """
        message = self.batch.prepare(message, delay)
        scope.add(self, _row(MESSAGE, message, delay))
        return message

    def add_member(self, scope: Scope, message: Message[Any]) -> None:
        """Write in a transaction that a group's member has completed. ``message`` has the options of the group."""
        # The job may have put values into the message that can't be encoded.
        options = {name: message.options[name] for name in ("group_completion_uuid", "group_completion_callbacks")}
        member: Message[Any] = Message(
            message.queue_name, message.actor_name, (), {}, options, message_id=message.message_id
        )
        scope.add(self, _row(MEMBER, member, None))

    def insert(self, connection: Connection, row: NewRow, written: WrittenRows) -> None:
        """Insert a row over the caller's connection.

        Raises:
          ConfigurationError: The table is missing.
        """
        try:
            written.add(self.table.insert(connection, row, written.owner, due=self.wait == 0 and not self.is_inline))
        except Exception as error:
            if is_missing_table(error):
                raise ConfigurationError(f"The outbox has no table: {self.how_to_create}.") from error
            raise

    def after_commit(self, written: WrittenRows, connection: Connection | None = None) -> Ticket | None:
        """Start to publish committed rows. Never raises.

        On a StubBroker the rows are published before the return, over ``connection`` if given.

        Returns:
          The ticket for `wait_for`; None if there is nothing to wait for.
        """
        if not written.ids or (self.wait == 0 and not self.is_inline):
            return None
        try:
            written = written.take_all()
            if self.is_inline:
                run = self.run_over(connection)
                self.publication.publish_committed(run, written.ids, [written.owner], written.since or 0.0)
                return None
            return self.publisher.submit(written)
        except Exception:
            logger.exception("Committed messages could not be published at once. A relay publishes them.")
            return None

    def run_over(self, connection: Connection | None) -> RunWork:
        """Return a function that calls work with ``connection``, or with a connection of the library's own for None."""
        return self.database.run if connection is None else partial(_call, connection)

    def wait_for(self, ticket: Ticket | None) -> None:
        """Wait for the publication of rows, at most ``wait`` milliseconds. Never raises."""
        if ticket is not None and not self.publisher.is_stuck():
            ticket.wait(self.wait / 1_000)

    # The test kit.

    def before_job(self) -> object:
        """Return the state before a job, for `forget_job`. For the test kit."""
        return innermost()

    def forget_job(self, before: object) -> None:
        """End the transactions left open by a job with a dead worker. For the test kit."""
        for scope in leave_since(before):
            scope.abandon()

    # The relay.

    def run_relay(self, stop: threading.Event) -> None:
        """Publish due rows until ``stop`` is set: the relay as a separate process."""
        self._make_relay().run(stop)

    def relay_once(self) -> int:
        """Publish one batch of due rows. Returns the number of taken rows.

        Raises:
          Exception: The error of the database.
        """
        return self._relay.relay()[0]

    @cached_property
    def _relay(self) -> Relay:
        return self._make_relay()

    def _make_relay(self) -> Relay:
        return Relay(self.database, self.publication, self.how_to_create)

    def after_worker_boot(self, broker: Broker, worker: Worker) -> None:
        if not self.relay or self.is_inline:
            return
        self._thread.add_worker(worker)

    def before_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        self._thread.remove_worker(worker)
        self._thread.join(_SHUTDOWN)


class Scope:
    """One open transaction of the caller."""

    def abandon(self) -> None:
        """Roll back a transaction whose job is dead. For the test kit."""

    def add(self, outbox: Outbox, row: NewRow) -> None:
        """Write a row in the transaction, and arrange a call of `Outbox.after_commit` after the commit.

        Raises:
          ConfigurationError: The table is missing.
          Exception: The error of the database.
        """
        raise NotImplementedError


def outbox_on(state: BrokerState) -> Outbox | None:
    """Return the outbox of a broker; None without one."""
    return next((one for one in arrangement_of(state).attached if isinstance(one, Outbox)), None)


def _row(kind: str, message: Message[Any], delay: int | None) -> NewRow:
    return NewRow(kind, message.message_id, message.actor_name, q_name(message.queue_name), message.encode(), delay)


def _call(connection: Connection, work: Callable[[Connection], Any]) -> Any:
    return work(connection)
