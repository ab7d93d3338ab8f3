"""``dramatiq-policies queues`` and ``monitor``: show and move messages, and run the QueueMonitor."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from datetime import datetime, timezone
from typing import Any

import click
from dramatiq.broker import Broker
from rich.text import Text

from .. import ops
from ..brokers.readers import QueueReader, QueueReading, reader_of
from ..common.durations import format_duration
from ..common.plurals import counted
from ..common.safe_logger import SafeLogger
from ..errors import how_to_add
from .app_command import AppCommand, load_app
from .changes import confirm, interruptible, progress_bar, report_unreadable
from .completion import actor_names, queue_names
from .help import WholeSummaries
from .options import format_option, parse_duration, path_option
from .output import as_json, console, ignore_broken_pipe, print_json, print_table, printable_text
from .output import table as make_table
from .process import prepare_long_run

__all__ = ["monitor", "queues"]


class _WithDefault(WholeSummaries):
    """``queues app`` is ``queues show app``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Two words are a misspelt command with its application.
        words = len(list(itertools.takewhile(lambda one: not one.startswith("-"), args[:2])))
        if words < 2 and (not args or (args[0] not in self.commands and args[0] not in ("-h", "--help"))):
            args = ["show", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_WithDefault)
def queues() -> None:
    """Show the ready, delayed, running and dead messages: queues APP. Move messages: queues move."""


_COLUMNS = ("queue", "ready", "delayed", "running", "dead", "oldest")
#: The column of each measure of a threshold.
_MEASURES = {"ready": "ready", "oldest": "oldest", "stalled": "oldest", "dead": "dead"}


@queues.command(cls=AppCommand)
@click.argument("app")
@path_option
@click.option("-q", "--queue", "names", multiple=True, shell_complete=queue_names, help="Only this queue; repeatable.")
@click.option(
    "-w", "--watch", is_flag=True, help="Repeat until interrupted; adds the change of ready messages per second."
)
@click.option(
    "--interval",
    callback=parse_duration,
    default="2s",
    show_default=True,
    metavar="TIME",
    help="The time between two readings of --watch.",
)
@click.option("--fail-on-breach", is_flag=True, help="Exit with 1 if a queue breaches a threshold of the QueueMonitor.")
@format_option()
def show(
    app: str, path: tuple[str, ...], names: tuple[str, ...], watch: bool, interval: int, fail_on_breach: bool, form: str
) -> int:
    """Show ready, delayed, running and dead messages and the oldest age, for each queue of APP and the outbox.

    "-" means none, as the age in an empty queue, or unknown: on RabbitMQ the running messages while a worker lives, and the
    age at the first reading. There, name a queue that no actor declares any more with -q: AMQP can't list queues.
    """
    broker = load_app(app, path)
    if fail_on_breach and ops.monitor_of(broker) is None:
        raise _no_monitor()
    if watch:
        _watch(broker, names, interval, form)
        return 0
    states, error = _read(broker, names)
    if error is not None:
        click.echo(error, err=True)
    with ignore_broken_pipe():
        if form == "json":
            print_json([state.asdict() for state in states])
        else:
            print_table(_COLUMNS, [_row(state) for state in states], right=_COLUMNS[1:])
            for state in states:
                for breach in state.breaches:
                    click.echo(printable_text(breach), err=True)
    if not fail_on_breach:
        return 0
    if any(state.breaches for state in states):
        return 1
    return 0 if error is None else 2


def _read(
    broker: Broker, names: tuple[str, ...], reader: QueueReader | None = None
) -> tuple[list[ops.QueueState], str | None]:
    """Read the queues, and the outbox unless queues are named.

    Returns the error of a database that can't be read beside the queues, because it hides no queue.
    """
    states = ops.read_queues(broker, names, reader=reader)
    try:
        outbox = None if names else ops.read_outbox_row(broker)
    except ops.OperationError as error:
        return states, printable_text(error)
    return (states if outbox is None else [*states, outbox]), None


def _row(state: ops.QueueState) -> list[Any]:
    reading = state.reading
    late = {_MEASURES[breach.measure] for breach in state.breaches}
    cells = {
        "queue": "(outbox)" if state.is_outbox else reading.queue if state.declared else f"{reading.queue} (no actor)",
        **{name: getattr(reading, name) for name in ("ready", "delayed", "running", "dead")},
        "oldest": None if reading.oldest_ms is None else format_duration(reading.oldest_ms) if reading.ready else None,
    }
    return [Text(str(cells[name]), style="bold red") if name in late else cells[name] for name in _COLUMNS]


def _watch(broker: Broker, names: tuple[str, ...], interval: int, form: str) -> None:
    reader = reader_of(broker)
    before: dict[str, tuple[float, int]] = {}
    columns = (*_COLUMNS, "ready/s")
    out = console()
    try:
        with (
            out.screen(hide_cursor=True) if out.is_terminal and form == "human" else contextlib.nullcontext() as screen
        ):
            while True:
                states, error = _read(broker, names, reader)
                if error is not None and screen is None:
                    click.echo(error, err=True)
                changes = {state.reading.queue: _change(before, state.reading) for state in states}
                at = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
                if form == "json":
                    for state in states:
                        found = {"at": at, **state.asdict(), "ready_per_second": changes[state.reading.queue]}
                        click.echo(as_json(found))
                    sys.stdout.flush()
                else:
                    rows = [[*_row(state), _signed(changes[state.reading.queue])] for state in states]
                    if screen is None:
                        print_table(columns, rows, right=columns[1:])
                        sys.stdout.flush()
                    else:
                        below = () if error is None else (Text(error),)
                        screen.update(make_table(columns, rows, right=columns[1:]), *below)
                time.sleep(interval / 1_000)
    except KeyboardInterrupt:
        pass
    finally:
        reader.close()


def _change(before: dict[str, tuple[float, int]], reading: QueueReading) -> float | None:
    """Return the growth of the queue since the last reading, in messages per second."""
    if reading.ready is None:
        return None
    now = time.monotonic()
    then = before.get(reading.queue)
    before[reading.queue] = (now, reading.ready)
    return None if then is None else round((reading.ready - then[1]) / max(now - then[0], 1e-3), 1)


def _signed(change: float | None) -> str | None:
    return None if change is None else f"{change:+.1f}" if change else "0"


@queues.command(cls=AppCommand)
@click.argument("app")
@click.argument("queue", shell_complete=queue_names)
@click.option(
    "--to",
    "target",
    required=True,
    metavar="QUEUE",
    shell_complete=queue_names,
    help="The target queue, declared by the application.",
)
@click.option("--actor", metavar="NAME", shell_complete=actor_names, help="Only messages of this actor.")
@click.option("-n", "--limit", metavar="COUNT", type=click.IntRange(1), help="At most this many, the oldest first.")
@click.option("--dry-run", is_flag=True, help="Only print the number; change nothing.")
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
@path_option
@format_option()
def move(
    app: str,
    queue: str,
    target: str,
    actor: str | None,
    limit: int | None,
    dry_run: bool,
    yes: bool,
    path: tuple[str, ...],
    form: str,
) -> None:
    """Move ready messages from QUEUE of APP to the end of another queue, in their order.

    Use it for urgent messages in a long queue, or to empty a retired queue. Each message keeps its id, arguments and
    attempts; its waiting time starts anew.

    Delayed messages, dead letters, received messages and unreadable messages stay in QUEUE.

    An interruption loses no message: each is in one of the two queues. On RabbitMQ a single message may be in both, and runs
    twice unless the job is idempotent. Call the command again for the rest.
    """
    broker = load_app(app, path)
    moved, where = ops.MoveResult(), ops.Tally(ops.Filter(actor=actor))
    if dry_run or not yes:
        ops.move(broker, queue, target, limit=limit, dry_run=True, where=where, moved=moved)
        if moved.count and not dry_run:
            confirm(f"Move {counted(moved.count, 'message')} ({where.breakdown(moved.count)}) to {target}?")
    if not dry_run and (yes or moved.count):
        moved, where = ops.MoveResult(), ops.Tally(where.where)
        with progress_bar("Moving") as progress, interruptible(moved, "message", "moved"):
            ops.move(broker, queue, target, limit=limit, progress=progress, moved=moved, where=where)
    if form == "json":
        print_json({"count": moved.count, "unreadable": moved.unreadable, "dry_run": dry_run})
    else:
        click.echo(f"{counted(moved.count, 'message')} {'would be moved' if dry_run else 'moved'} to {target}.")
    report_unreadable(moved)
    if not moved.count and not moved.unreadable and (sentence := where.no_match(broker.actors)) is not None:
        click.echo(printable_text(sentence.replace("dead letter", "ready message")), err=True)
        raise click.exceptions.Exit(1)


@click.command(cls=AppCommand)
@click.argument("app")
@path_option
def monitor(app: str, path: tuple[str, ...]) -> None:
    """Run the QueueMonitor of APP as a separate process, which alerts even if no worker runs."""
    broker = load_app(app, path)
    found = ops.monitor_of(broker)
    if found is None:
        raise _no_monitor()
    stop = prepare_long_run()
    SafeLogger("dramatiq_policies.monitor").info(
        "Watching %s every %s.", ", ".join(ops.known_queues(broker)) or "no queue", format_duration(found.interval)
    )
    found.run_forever(stop)


def _no_monitor() -> ops.OperationError:
    add = how_to_add("QueueMonitor(thresholds={…})", "install(broker, queue_monitor=QueueMonitor(…))")
    return ops.OperationError(f"The broker has no QueueMonitor. {add}.")
