"""``dramatiq-policies dead``: look at dead letters, replay and purge them."""

from __future__ import annotations

import contextlib
import functools
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import click
from dramatiq.broker import Broker
from rich.cells import cell_len

from .. import ops
from .._dramatiq import kind_of
from ..common.durations import format_duration
from ..common.plurals import counted
from ..delivery.validation import is_number
from .app_command import AppCommand, load_app
from .changes import confirm, interruptible, progress_bar, report_unreadable
from .completion import queue_names
from .filters import filters, parse_filters, report_nothing_found
from .help import WholeSummaries
from .options import expect_finite, format_option, path_option
from .output import console, print_json, print_json_stream, print_table, printable_text, timestamp

__all__ = ["dead", "no_dead_letters"]


@click.group(cls=WholeSummaries)
def dead() -> None:
    """Show dead letters, send them again, or delete them.

    On RabbitMQ name a queue that no actor declares any more with -q: AMQP can't list queues.
    """


@dead.command(cls=AppCommand)
@filters
@format_option()
def summary(form: str, **given: Any) -> None:
    """Count dead letters by actor, exception and outcome, the most frequent first."""
    broker, queues, where = parse_filters(**given)
    groups = ops.summarise(broker, queues, where)
    if form == "json":
        print_json([group.asdict() for group in groups])
    if not groups:
        report_nothing_found(broker, where)
    if form == "json":
        return
    if not groups:
        click.echo(no_dead_letters(broker, queues))
        return
    print_table(
        ["count", "actor", "exception", "outcome", "first seen", "last seen"],
        [
            [
                group.count,
                group.actor,
                group.exception,
                _outcome(group.outcome, group.reason),
                timestamp(group.first_seen),
                timestamp(group.last_seen),
            ]
            for group in groups
        ],
        right=["count"],
    )


def no_dead_letters(broker: Broker, queues: Sequence[str]) -> str:
    """Say which queues have no dead letters: AMQP can't list the queues that no actor declares."""
    return "No dead letters." if queues or kind_of(broker) != "rabbitmq" else "No dead letters on the declared queues."


def _outcome(outcome: str, reason: str | None) -> str:
    return outcome if reason is None else f"{outcome} ({reason})"


@dead.command("list", cls=AppCommand)
@filters
@click.option("-n", "--limit", type=click.IntRange(1), help="At most this many.")
@click.option("--oldest", is_flag=True, help="The oldest of each queue first, printed while reading.")
@format_option()
def list_(form: str, limit: int | None, oldest: bool, **given: Any) -> None:
    """List dead letters, the newest first.

    On a terminal, ids are shortened and long lines are split. Every command accepts a shortened id.
    """
    broker, queues, where = parse_filters(**given)
    with contextlib.closing(ops.dead_letters(broker, queues, where, limit=limit if oldest else None)) as read:
        dead_letters = read if oldest else iter(ops.newest(read, limit))
        if form == "json":
            print_json_stream(dead_letter.row() for dead_letter in dead_letters)
        else:
            _print_dead_letters(dead_letters)
    if not where.matched and not where.unreadable:
        report_nothing_found(broker, where)
        if form != "json":
            click.echo(no_dead_letters(broker, queues), err=True)


#: Characters of an id on a terminal. In a list of 10,000 random ids, the chance of a collision is 1 in 86.
_SHORT_ID = 8


def _print_dead_letters(dead_letters: Iterator[ops.DeadLetter]) -> None:
    out = console()
    for dead_letter in dead_letters:
        text = " ".join((dead_letter.text or "").split())
        error = f"{(dead_letter.exception or '-').rpartition('.')[2]}: {text}" if text else dead_letter.exception or "-"
        id_ = dead_letter.message_id or "-"
        place = [dead_letter.queue, dead_letter.actor or "-"]
        ending = [_outcome(dead_letter.outcome, dead_letter.reason), error]
        if not out.is_terminal:
            # Ten times as fast.
            click.echo(printable_text("  ".join([timestamp(dead_letter.failed_at), id_, *place, *ending])))
            continue
        head = [timestamp(dead_letter.failed_at), id_[:_SHORT_ID], *place]
        line = printable_text("  ".join([*head, *ending]))
        if cell_len(line) <= out.width:
            click.echo(line)
        else:
            for part, indent in (("  ".join(head), ""), *((part, "    ") for part in ending)):
                click.echo(_folded(printable_text(part), out.width, indent))


def _folded(text: str, width: int, indent: str) -> str:
    """Wrap a text at blanks only, without breaking names."""
    return textwrap.fill(
        text, width, initial_indent=indent, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


@dead.command(cls=AppCommand)
@click.argument("app")
@click.argument("message_id")
@path_option
@click.option("--args", is_flag=True, help="Show the arguments too.")
@format_option()
def show(app: str, message_id: str, path: tuple[str, ...], args: bool, form: str) -> None:
    """Show a dead letter: failure, history and traceback; arguments only with --args."""
    broker = load_app(app, path)
    whole = ops.resolve_ids(broker, (), (message_id,))
    dead_letters = list(ops.dead_letters(broker, (), ops.Filter(message_ids=whole)))
    if not dead_letters:
        raise ops.OperationError(f"There is no dead letter with the id {message_id!r}; dead list shows the ids.")
    # On RabbitMQ a message may have two dead letters.
    found = dead_letters[-1].asdict(args=args)
    if form == "json":
        print_json(found)
        return
    trace = found.pop("traceback")
    history = found.pop("history")
    found["failed_at"] = timestamp(found["failed_at"])
    print_table(["", ""], [(name, value) for name, value in found.items() if value not in (None, {}, [])])
    if history:
        click.echo()
        print_table(
            ["attempt", "failed at", "exception", "text", "again after"],
            [
                [
                    run.get("attempt"),
                    timestamp(run.get("failed_at")),
                    run.get("exception"),
                    " ".join(str(run.get("message")).split()),
                    _wait(run.get("delay_ms")),
                ]
                for run in history
            ],
        )
    if trace:
        click.echo(f"\n{printable_text(trace, lines=True).rstrip()}")


def _wait(delay: Any) -> str | None:
    return format_duration(delay) if is_number(delay) else None


@dead.command(cls=AppCommand)
@filters
@click.option("-n", "--limit", type=click.IntRange(1), help="At most this many.")
@click.option("--dry-run", is_flag=True, help="Only print the number; change nothing.")
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), callback=expect_finite, help="At most this many per second."
)
@click.option(
    "--to-queue", metavar="QUEUE", shell_complete=queue_names, help="Send to this queue instead of the original queues."
)
@click.option(
    "--new-id",
    is_flag=True,
    help="Give each a new message id, so that it runs even if its old id completed; see docs/operating.md.",
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
    **given: Any,
) -> None:
    """Send dead letters again. An interruption loses no message."""
    broker, queues, where = parse_filters(**given)
    if to_queue is not None:
        ops.find_queue(broker, to_queue)
    act = functools.partial(ops.replay, broker, queues, to_queue=to_queue, new_id=new_id, rate=rate, limit=limit)
    words = _Words("Replay {}?", "Replaying", "replayed")
    _carry_out(act, words, broker, where, dry_run=dry_run, yes=yes, form=form)


@dead.command(cls=AppCommand)
@filters
@click.option("-n", "--limit", type=click.IntRange(1), help="At most this many.")
@click.option("--dry-run", is_flag=True, help="Only print the number; change nothing.")
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
@format_option()
def purge(limit: int | None, dry_run: bool, yes: bool, form: str, **given: Any) -> None:
    """Delete dead letters permanently."""
    broker, queues, where = parse_filters(**given)
    act = functools.partial(ops.purge, broker, queues, limit=limit)
    words = _Words("Permanently delete {}?", "Deleting", "deleted")
    _carry_out(act, words, broker, where, dry_run=dry_run, yes=yes, form=form)


class _Words(NamedTuple):
    question: str
    doing: str
    done: str


def _carry_out(
    act: Callable[..., ops.MoveResult],
    words: _Words,
    broker: Broker,
    where: ops.Tally,
    *,
    dry_run: bool,
    yes: bool,
    form: str,
) -> None:
    """Ask, act and report; with a dry run only report."""
    if dry_run or not yes:
        would = act(where=where, dry_run=True)
        if dry_run or not would.count:
            _report(form, would, f"would be {words.done}" if dry_run else words.done, dry_run=dry_run)
            if not would.count and not would.unreadable:
                report_nothing_found(broker, where)
            return
        confirm(words.question.format(f"{counted(would.count, 'dead letter')} ({where.breakdown(would.count)})"))
    moved, where = ops.MoveResult(), ops.Tally(where.where)
    with progress_bar(words.doing) as progress, interruptible(moved, "dead letter", words.done):
        act(where=where, progress=progress, moved=moved)
    _report(form, moved, words.done, dry_run=False)
    if not moved.count and not moved.unreadable:
        report_nothing_found(broker, where)


def _report(form: str, moved: ops.MoveResult, done: str, *, dry_run: bool) -> None:
    """Report the result as text or JSON."""
    if form == "json":
        print_json({"count": moved.count, "unreadable": moved.unreadable, "dry_run": dry_run})
    else:
        click.echo(f"{counted(moved.count, 'dead letter')} {done}.")
    report_unreadable(moved)
