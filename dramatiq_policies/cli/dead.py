"""``dramatiq-policies dead``: what has died, why, and how it gets another try."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import click
from dramatiq.broker import Broker

from .. import ops
from .app_command import AppCommand
from .base import (
    age,
    confirm,
    console,
    counted,
    finite,
    format_option,
    interruptible,
    path_option,
    print_json,
    print_json_stream,
    print_table,
    progress_bar,
    say_unreadable,
    shown,
)
from .completion import queue_names
from .filters import check_actor_name, chosen, filters

__all__ = ["dead"]


@click.group()
def dead() -> None:
    """Look at the dead letters, send them again, or delete them."""


@dead.command(cls=AppCommand)
@filters
@format_option()
def summary(form: str, **meant: Any) -> None:
    """How many of what: counts by actor, exception and outcome, the most frequent first."""
    broker, queues, where = chosen(**meant)
    groups = ops.summarise(broker, queues, where)
    if not groups:
        check_actor_name(broker, where)
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


@dead.command("list", cls=AppCommand)
@filters
@click.option("-n", "--limit", type=click.IntRange(1), help="So many at most.")
@format_option()
def list_(form: str, limit: int | None, **meant: Any) -> None:
    """One line for each dead letter, the oldest of each queue first, as they are read."""
    broker, queues, where = chosen(**meant)
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
            line = shown(
                f"{age(letter.failed_at)}  {letter.message_id or '-'}  {letter.queue}  {letter.actor or '-'}  "
                f"{_outcome(letter.outcome, letter.reason)}  {error}"
            )
            if out.is_terminal:
                out.print(line, overflow="ellipsis", no_wrap=True)
            else:
                # Ten times as fast.
                click.echo(line)
    if not found:
        check_actor_name(broker, where)
        click.echo("No dead letters.", err=True)


@dead.command(cls=AppCommand)
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
    found = letters[-1].asdict(args=args)
    if form == "json":
        print_json(found)
        return
    trace = found.pop("traceback")
    history = found.pop("history")
    found["failed_at"] = age(found["failed_at"])
    print_table(["", ""], [(name, value) for name, value in found.items() if value not in (None, {}, [])])
    if history:
        click.echo()
        print_table(
            ["attempt", "failed at", "exception", "text", "again after"],
            [
                [
                    run.get("attempt"),
                    age(run.get("failed_at")),
                    run.get("exception"),
                    " ".join(str(run.get("message")).split()),
                    None if run.get("delay_ms") is None else f"{run['delay_ms']} ms",
                ]
                for run in history
            ],
        )
    if trace:
        click.echo(f"\n{shown(trace, lines=True).rstrip()}")


@dead.command(cls=AppCommand)
@filters
@click.option("-n", "--limit", type=click.IntRange(1), help="So many at most.")
@click.option("--dry-run", is_flag=True, help="Only say how many it would be.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), callback=finite, help="So many a second at most.")
@click.option(
    "--to-queue", metavar="QUEUE", shell_complete=queue_names, help="Send them to this queue instead of their own."
)
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
    broker, queues, where = chosen(**meant)
    if to_queue is not None:
        ops.find_queue(broker, to_queue)
    act = functools.partial(ops.replay, broker, queues, where, to_queue=to_queue, new_id=new_id, rate=rate, limit=limit)
    words = _Words("Replay {}?", "Replaying", "replayed")
    _carry_out(act, words, broker, where, dry_run=dry_run, yes=yes, form=form)


@dead.command(cls=AppCommand)
@filters
@click.option("-n", "--limit", type=click.IntRange(1), help="So many at most.")
@click.option("--dry-run", is_flag=True, help="Only say how many it would be.")
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
@format_option()
def purge(limit: int | None, dry_run: bool, yes: bool, form: str, **meant: Any) -> None:
    """Delete dead letters for good."""
    broker, queues, where = chosen(**meant)
    act = functools.partial(ops.purge, broker, queues, where, limit=limit)
    words = _Words("Delete {} for good?", "Deleting", "deleted")
    _carry_out(act, words, broker, where, dry_run=dry_run, yes=yes, form=form)


class _Words(NamedTuple):
    question: str
    doing: str
    done: str


def _carry_out(
    act: Callable[..., ops.Moved],
    words: _Words,
    broker: Broker,
    where: ops.Filter,
    *,
    dry_run: bool,
    yes: bool,
    form: str,
) -> None:
    """Do it, after a question unless somebody has said yes already; or only say what it would be."""
    if dry_run or not yes:
        would = act(dry_run=True)
        if not would.count and not would.unreadable:
            check_actor_name(broker, where)
        if dry_run or not would.count:
            _said(form, would, f"would be {words.done}" if dry_run else words.done, dry_run=dry_run)
            return
        confirm(words.question.format(counted(would.count, "dead letter")))
    moved = ops.Moved()
    with progress_bar(words.doing) as progress, interruptible(moved, "dead letter", words.done):
        act(progress=progress, moved=moved)
    _said(form, moved, words.done, dry_run=False)


def _said(form: str, moved: ops.Moved, done: str, *, dry_run: bool) -> None:
    """Say what was done, to people or to programs."""
    if form == "json":
        print_json({"count": moved.count, "unreadable": moved.unreadable, "dry_run": dry_run})
    else:
        click.echo(f"{counted(moved.count, 'dead letter')} {done}.")
    say_unreadable(moved)
