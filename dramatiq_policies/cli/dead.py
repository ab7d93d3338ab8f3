"""``dramatiq-policies dead``: what has died, why, and how it gets another try."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import click
from dramatiq.broker import Broker

from .. import ops
from .base import (
    age,
    confirm,
    console,
    counted,
    format_option,
    interruptible,
    length,
    parse_tags,
    path_option,
    print_json,
    print_json_stream,
    print_table,
    progress_bar,
)

__all__ = ["dead"]

F = TypeVar("F", bound=Callable[..., Any])


@click.group()
def dead() -> None:
    """Look at the dead letters, send them again, or delete them."""


def filters(command: F) -> F:
    """The options that say which dead letters are meant."""
    for option in reversed(
        [
            click.argument("app"),
            path_option,
            click.option("-q", "--queue", "queues", multiple=True, help="Only of this queue; may be repeated."),
            click.option("--actor", help="Only of this actor."),
            click.option("--error", help="Only with this exception: its path, its bare name, or a part of its text."),
            click.option("--outcome", type=click.Choice(["dead", "alerted", "expired", "discarded"])),
            click.option("--reason", help="Only with this reason: exhausted, unclassified, crashed, …"),
            click.option(
                "--tag", "tags", multiple=True, metavar="NAME=VALUE", help="Only with this tag; may be repeated."
            ),
            click.option(
                "--id", "message_ids", multiple=True, metavar="ID", help="Only this message; may be repeated."
            ),
            click.option("--older-than", callback=length, metavar="TIME", help="Only if it failed longer ago: 2h, 7d."),
            click.option("--newer-than", callback=length, metavar="TIME", help="Only if it failed later: 30m."),
        ]
    ):
        command = option(command)
    return command


def _meant(
    app: str,
    path: tuple[str, ...],
    queues: tuple[str, ...],
    actor: str | None,
    error: str | None,
    outcome: str | None,
    reason: str | None,
    tags: tuple[str, ...],
    message_ids: tuple[str, ...],
    older_than: int | None,
    newer_than: int | None,
) -> tuple[Broker, tuple[str, ...], ops.Filter]:
    broker = ops.load_broker(app, path)
    for queue in queues:
        ops.find_queue(broker, queue)
    where = ops.Filter(
        actor=actor,
        outcome=outcome,
        reason=reason,
        error=error,
        tags=parse_tags(tags),
        message_ids=message_ids,
        older_than_ms=older_than,
        newer_than_ms=newer_than,
    )
    return broker, queues, where


def _nothing(broker: Broker, where: ops.Filter) -> None:
    """Nothing was found: perhaps the actor's name is wrong."""
    if where.actor is not None and where.actor not in broker.actors:
        raise ops.OperationError(f"There is no actor {where.actor!r}{ops.meant(where.actor, broker.actors)}")


@dead.command()
@filters
@format_option()
def summary(form: str, **meant: Any) -> None:
    """How many of what: counts by actor, exception and outcome, the most frequent first."""
    broker, queues, where = _meant(**meant)
    groups = ops.summarise(broker, queues, where)
    if not groups:
        _nothing(broker, where)
    if form == "json":
        print_json([group.asdict() for group in groups])
        return
    if not groups:
        click.echo("No dead letters.")
        return
    print_table(
        ["count", "actor", "exception", "outcome", "first seen", "last seen"],
        [
            [
                group.count,
                group.actor,
                group.exception,
                _outcome(group.outcome, group.reason),
                age(group.first_seen),
                age(group.last_seen),
            ]
            for group in groups
        ],
        right=["count"],
    )


def _outcome(outcome: str, reason: str | None) -> str:
    return outcome if reason is None else f"{outcome} ({reason})"


@dead.command("list")
@filters
@click.option("-n", "--limit", type=click.IntRange(1), help="So many at most.")
@format_option()
def list_(form: str, limit: int | None, **meant: Any) -> None:
    """One line for each dead letter, the oldest of each queue first, as they are read."""
    broker, queues, where = _meant(**meant)
    letters = ops.dead_letters(broker, queues, where, limit=limit)
    if form == "json":
        print_json_stream(letter.row() for letter in letters)
        return
    out = console()
    found = False
    with contextlib.closing(letters):
        for letter in letters:
            found = True
            text = " ".join((letter.text or "").split())
            error = f"{(letter.exception or '-').rpartition('.')[2]}: {text}" if text else letter.exception or "-"
            out.print(
                f"{age(letter.failed_at)}  {letter.message_id or '-'}  {letter.queue}  {letter.actor or '-'}  "
                f"{_outcome(letter.outcome, letter.reason)}  {ops.redact(error)}",
                overflow="ellipsis",
                no_wrap=True,
            )
    if not found:
        _nothing(broker, where)
        click.echo("No dead letters.", err=True)


@dead.command()
@click.argument("app")
@click.argument("message_id")
@path_option
@click.option("--args", is_flag=True, help="Show the arguments too.")
@format_option()
def show(app: str, message_id: str, path: tuple[str, ...], args: bool, form: str) -> None:
    """All that one dead letter says: its failure, its history, its traceback; its arguments only if asked for."""
    broker = ops.load_broker(app, path)
    letters = list(ops.dead_letters(broker, (), ops.Filter(message_ids=(message_id,))))
    if not letters:
        raise ops.OperationError(f"There is no dead letter with the id {message_id!r}.")
    # On RabbitMQ one message may have two.
    shown = letters[-1].asdict(args=args)
    if form == "json":
        print_json(shown)
        return
    trace = shown.pop("traceback")
    history = shown.pop("history")
    shown["failed_at"] = age(shown["failed_at"])
    print_table(
        ["", ""], [(name, ops.redact(str(value))) for name, value in shown.items() if value not in (None, {}, [])]
    )
    if history:
        click.echo()
        print_table(
            ["attempt", "failed at", "exception", "text", "again after"],
            [
                [
                    run.get("attempt"),
                    age(run.get("failed_at")),
                    run.get("exception"),
                    ops.redact(" ".join(str(run.get("message")).split())),
                    None if run.get("delay_ms") is None else f"{run['delay_ms']} ms",
                ]
                for run in history
            ],
        )
    if trace:
        click.echo(f"\n{ops.redact(trace).rstrip()}")


@dead.command()
@filters
@click.option("-n", "--limit", type=click.IntRange(1), help="So many at most.")
@click.option("--dry-run", is_flag=True, help="Only say how many it would be.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="So many a second at most.")
@click.option("--to-queue", metavar="QUEUE", help="Send them to this queue instead of their own.")
@click.option(
    "--new-id", is_flag=True, help="Give each a message id of its own; it runs anyway, see docs/operating.md."
)
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
@format_option()
def replay(
    limit: int | None,
    dry_run: bool,
    rate: float | None,
    to_queue: str | None,
    new_id: bool,
    yes: bool,
    form: str,
    **meant: Any,
) -> None:
    """Send dead letters again, as if for the first time; loses none, whenever it is interrupted."""
    broker, queues, where = _meant(**meant)
    if to_queue is not None:
        ops.find_queue(broker, to_queue)
    if not _wanted("Replay {}?", "{} would be replayed.", broker, queues, where, limit, dry_run, yes, form):
        return
    moved = ops.Moved()
    with progress_bar("Replaying") as progress, interruptible(moved, "dead letter", "replayed"):
        ops.replay(
            broker,
            queues,
            where,
            to_queue=to_queue,
            new_id=new_id,
            rate=rate,
            limit=limit,
            progress=progress,
            moved=moved,
        )
    _said(form, moved, "replayed", dry_run=False)


@dead.command()
@filters
@click.option("-n", "--limit", type=click.IntRange(1), help="So many at most.")
@click.option("--dry-run", is_flag=True, help="Only say how many it would be.")
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
@format_option()
def purge(limit: int | None, dry_run: bool, yes: bool, form: str, **meant: Any) -> None:
    """Delete dead letters for good."""
    broker, queues, where = _meant(**meant)
    if not _wanted("Delete {} for good?", "{} would be deleted.", broker, queues, where, limit, dry_run, yes, form):
        return
    moved = ops.Moved()
    with progress_bar("Deleting") as progress, interruptible(moved, "dead letter", "deleted"):
        ops.purge(broker, queues, where, limit=limit, progress=progress, moved=moved)
    _said(form, moved, "deleted", dry_run=False)


def _wanted(
    question: str,
    would: str,
    broker: Broker,
    queues: tuple[str, ...],
    where: ops.Filter,
    limit: int | None,
    dry_run: bool,
    yes: bool,
    form: str,
) -> bool:
    """Whether it is to be done; if not, what it would be is said."""
    if yes and not dry_run:
        return True
    count = sum(1 for _ in ops.dead_letters(broker, queues, where, limit=limit))
    letters = counted(count, "dead letter")
    if not count:
        _nothing(broker, where)
    if dry_run or not count:
        _told(form, would.format(letters) if dry_run else "No dead letters.", count=count, dry_run=dry_run)
        return False
    confirm(question.format(letters))
    return True


def _said(form: str, moved: ops.Moved, done: str, **more: Any) -> None:
    _told(
        form, f"{counted(moved.count, 'dead letter')} {done}.", count=moved.count, unreadable=moved.unreadable, **more
    )
    if moved.unreadable:
        click.echo(f"{moved.unreadable} can't be read and stay where they are.", err=True)


def _told(form: str, text: str, **found: Any) -> None:
    """Say what was done, to people or to programs."""
    if form == "json":
        print_json({"unreadable": 0, **found})
    else:
        click.echo(text)
