"""List, retry and delete the messages of the outbox, for ``dramatiq-policies outbox``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from ..delivery.broker_state import state_of
from ..errors import how_to_add
from ..transactions.database import Connection, is_missing_table
from ..transactions.outbox import Outbox, outbox_on
from ..transactions.outbox_rows import OutboxGroup, OutboxRow, OutboxStats, Selection
from .app import OperationError, did_you_mean, known_queues
from .unreachable import database_error

if TYPE_CHECKING:
    from dramatiq.broker import Broker

__all__ = [
    "NoOutboxTable",
    "OutboxGroup",
    "OutboxRow",
    "OutboxStats",
    "Selection",
    "ask_database",
    "count_outbox",
    "explain_no_match",
    "list_outbox",
    "outbox_of",
    "purge_outbox",
    "read_outbox",
    "relay_outbox",
    "retry_outbox",
    "select_outbox",
]

T = TypeVar("T")
#: How many ids an ambiguous beginning lists.
_SHOWN = 3


class NoOutboxTable(OperationError):
    """The database has no table of the outbox."""


def outbox_of(broker: Broker) -> Outbox:
    """Return the outbox of a broker.

    Raises:
      OperationError: The broker has no outbox.
    """
    found = outbox_on(state_of(broker))
    if found is None:
        raise OperationError(
            "The broker has no outbox. "
            + how_to_add("dramatiq_policies.contrib.django.DjangoOutbox", "install(broker, outbox=SqlOutbox(engine))")
            + "."
        )
    return found


def read_outbox(broker: Broker) -> OutboxStats | None:
    """Count the messages that wait in the outbox; None without an outbox.

    Raises:
      OperationError: The database can't be read, or has no table.
    """
    outbox = outbox_on(state_of(broker))
    return None if outbox is None else ask_database(outbox, outbox.rows.stats)


def select_outbox(
    broker: Broker, *, message_ids: Iterable[str] = (), actor: str | None = None, queue: str | None = None
) -> Selection:
    """Return a selection of messages. Each id is given in full or by a unique beginning.

    Raises:
      OperationError: The broker has no outbox, the database can't be read, or a beginning fits several ids.
    """
    outbox = outbox_of(broker)
    return Selection(tuple(_whole_id(outbox, given) for given in message_ids), actor, queue)


def _whole_id(outbox: Outbox, given: str) -> str:
    found = ask_database(outbox, lambda connection: outbox.rows.ids_with_prefix(connection, given, _SHOWN + 1))
    if given in found or not found:
        return given
    if len(found) > 1:
        more = ", …" if len(found) > _SHOWN else ""
        raise OperationError(
            f"Several messages of the outbox begin with {given!r} ({', '.join(found[:_SHOWN])}{more}); "
            "write more characters."
        )
    return found[0]


def list_outbox(broker: Broker, where: Selection | None = None, *, limit: int = 100) -> list[OutboxRow]:
    """Return messages that wait in the outbox, the oldest first.

    Raises:
      OperationError: The broker has no outbox, or the database can't be read.
    """
    outbox = outbox_of(broker)
    return ask_database(outbox, lambda connection: outbox.rows.list(connection, where, limit))


def count_outbox(broker: Broker, where: Selection | None = None) -> list[OutboxGroup]:
    """Count messages of the outbox by actor and queue, the most frequent first. Errors as `list_outbox`."""
    outbox = outbox_of(broker)
    return ask_database(outbox, lambda connection: outbox.rows.count(connection, where))


def retry_outbox(broker: Broker, where: Selection | None = None) -> int:
    """Make messages due at once, however often they have failed; return how many. Errors as `list_outbox`.

    A message that a process is publishing stays with the process.
    """
    outbox = outbox_of(broker)
    return ask_database(outbox, lambda connection: outbox.rows.retry(connection, where))


def purge_outbox(broker: Broker, where: Selection | None = None) -> int:
    """Delete messages, which are then never sent; return how many. Errors as `list_outbox`.

    A message that a process is publishing is deleted too, but may be sent.
    """
    outbox = outbox_of(broker)
    return ask_database(outbox, lambda connection: outbox.rows.purge(connection, where))


def relay_outbox(broker: Broker, stop: threading.Event) -> None:
    """Publish messages of the outbox until ``stop`` is set. The batch in work is finished.

    Raises:
      OperationError: The broker has no outbox.
    """
    outbox_of(broker).run_relay(stop)


def explain_no_match(broker: Broker, where: Selection, given_ids: Iterable[str] = ()) -> str | None:
    """Return a sentence on a selection without a match, with the nearest name; None if the outbox is empty.

    Parameters:
      given_ids: The ids as the user gave them.
    """
    if where == Selection():
        return None
    groups = count_outbox(broker)
    given, hint = [], ""
    for name, value, known in (
        ("actor", where.actor, {*broker.actors, *(group.actor for group in groups)}),
        ("queue", where.queue, {*known_queues(broker), *(group.queue for group in groups)}),
    ):
        if value is not None:
            given.append(f"--{name} {value}")
            hint = hint or ("" if value in known else did_you_mean(value, sorted(known)).removesuffix("."))
    given += [f"--id {one}" for one in given_ids]
    total = sum(group.messages for group in groups)
    if not total and not hint:
        return None
    return f"Nothing in the outbox matches {' '.join(given)}: 0 of {total}{hint or '.'}"


def ask_database(outbox: Outbox, work: Callable[[Connection], T]) -> T:
    """Return the result of ``work`` on a connection of the outbox.

    Raises:
      NoOutboxTable: The database has no table of the outbox.
      OperationError: The database can't be read.
    """
    try:
        return outbox.database.run(work)
    except Exception as error:
        if is_missing_table(error):
            raise NoOutboxTable(f"The outbox has no table: {outbox.how_to_create}.") from None
        raise database_error(outbox.database, error) from None
