"""``dramatiq-policies outbox``: the messages that are committed in the database and not yet published."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from dramatiq.broker import Broker

from .. import ops
from ..common.durations import format_duration
from ..common.plurals import counted
from ..common.safe_logger import SafeLogger
from .app_command import AppCommand, load_app
from .changes import confirm
from .completion import actor_names, queue_names
from .help import WholeSummaries
from .options import format_option, path_option
from .output import print_json, print_table, printable_text
from .process import prepare_long_run

__all__ = ["outbox"]

logger = SafeLogger("dramatiq_policies.outbox")

F = TypeVar("F", bound=Callable[..., Any])

#: Characters of an id in the table.
_SHORT_ID = 8


@click.group(cls=WholeSummaries)
def outbox() -> None:
    """Show the messages that wait in the outbox, retry, delete or publish them."""


def _selection(command: F) -> F:
    """Add the options that select messages."""
    for option in reversed(
        [
            click.argument("app"),
            path_option,
            click.option(
                "--id",
                "message_ids",
                multiple=True,
                metavar="ID",
                help="Only this message id, or the only id with this beginning; repeatable.",
            ),
            click.option("--actor", metavar="NAME", shell_complete=actor_names, help="Only this actor."),
            click.option("-q", "--queue", metavar="NAME", shell_complete=queue_names, help="Only this queue."),
        ]
    ):
        command = option(command)
    return command


def _select(
    app: str, path: tuple[str, ...], message_ids: tuple[str, ...], actor: str | None, queue: str | None
) -> tuple[Broker, ops.Selection]:
    broker = load_app(app, path)
    return broker, ops.select_outbox(broker, message_ids=message_ids, actor=actor, queue=queue)


def _report_nothing(broker: Broker, where: ops.Selection, message_ids: tuple[str, ...]) -> None:
    """Exit with 1 if a selection matches nothing. Return if the outbox is empty."""
    sentence = ops.explain_no_match(broker, where, message_ids)
    if sentence is not None:
        click.echo(printable_text(sentence), err=True)
        raise click.exceptions.Exit(1)


@outbox.command("list", cls=AppCommand)
@_selection
@click.option("-n", "--limit", type=click.IntRange(1), default=100, show_default=True, help="At most this many.")
@format_option()
def list_(form: str, limit: int, message_ids: tuple[str, ...], **given: Any) -> None:
    """List the messages that wait in the outbox, the oldest first."""
    broker, where = _select(message_ids=message_ids, **given)
    rows = ops.list_outbox(broker, where, limit=limit + 1)
    shown = rows[:limit]
    if form == "json":
        print_json([_as_dict(row) for row in shown])
    elif shown:
        print_table(
            ["message", "actor", "queue", "age", "failures", "next try", "error"],
            [
                [
                    row.message_id[:_SHORT_ID],
                    row.actor,
                    row.queue,
                    format_duration(row.age_ms),
                    row.failures,
                    _next_try(row),
                    " ".join(row.error.split()) or None,
                ]
                for row in shown
            ],
            right=["age", "failures"],
        )
    if not rows:
        _report_nothing(broker, where, message_ids)
        if form != "json":
            click.echo("The outbox is empty.", err=True)
    elif len(rows) > limit:
        click.echo(f"Only the oldest {limit} are listed; --limit lists more.", err=True)


def _as_dict(row: ops.OutboxRow) -> dict[str, Any]:
    names = ("message_id", "kind", "actor", "queue", "age_ms", "failures")
    return {
        **{name: getattr(row, name) for name in names},
        "error": row.error or None,
        "due_in_ms": max(0, row.due_in_ms),
        "publishing": row.is_leased,
    }


def _next_try(row: ops.OutboxRow) -> str:
    if row.is_leased:
        return "publishing"
    return "now" if row.due_in_ms <= 0 else f"in {format_duration(row.due_in_ms)}"


@outbox.command(cls=AppCommand)
@_selection
@format_option()
def retry(form: str, message_ids: tuple[str, ...], **given: Any) -> None:
    """Make messages due now, however often they have failed. A relay then publishes them.

    A message that a process is publishing stays with the process.
    """
    broker, where = _select(message_ids=message_ids, **given)
    count = ops.retry_outbox(broker, where)
    _report(form, count, "due now")
    if not count and not ops.list_outbox(broker, where, limit=1):
        _report_nothing(broker, where, message_ids)


@outbox.command(cls=AppCommand)
@_selection
@click.option("--dry-run", is_flag=True, help="Only print the number; change nothing.")
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
@format_option()
def purge(form: str, dry_run: bool, yes: bool, message_ids: tuple[str, ...], **given: Any) -> None:
    """Delete messages of the outbox permanently. They are never sent, although their transaction has committed.

    A message that a process is publishing at this moment may still be sent.
    """
    broker, where = _select(message_ids=message_ids, **given)
    count = 0
    if dry_run or not yes:
        groups = ops.count_outbox(broker, where)
        count = sum(group.messages for group in groups)
        if count and not dry_run:
            parts = ", ".join(f"{group.messages} of {group.actor} in {group.queue}" for group in groups[:3])
            more = ", …" if len(groups) > 3 else ""
            confirm(f"Permanently delete {counted(count, 'message')} ({parts}{more}) that nobody has sent yet?")
    if not dry_run and (yes or count):
        count = ops.purge_outbox(broker, where)
    _report(form, count, "would be deleted" if dry_run else "deleted", dry_run=dry_run)
    if not count:
        _report_nothing(broker, where, message_ids)


def _report(form: str, count: int, done: str, *, dry_run: bool = False) -> None:
    if form == "json":
        print_json({"count": count, "dry_run": dry_run})
    else:
        click.echo(f"{counted(count, 'message')} {done}.")


@outbox.command(cls=AppCommand)
@click.argument("app")
@path_option
def relay(app: str, path: tuple[str, ...]) -> None:
    """Publish the messages of the outbox until SIGTERM or Ctrl-C, for workers with relay=False.

    Any number of relays share the messages; each message is published by one of them.
    """
    broker = load_app(app, path)
    ops.outbox_of(broker)
    stop = prepare_long_run()
    logger.info("Publishing the messages of the outbox.")
    ops.relay_outbox(broker, stop)
    logger.info("The relay has stopped.")
