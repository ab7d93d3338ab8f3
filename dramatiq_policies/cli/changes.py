"""Ask before a command changes messages, show the progress, and report an interruption."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import click

from ..common.plurals import counted
from ..ops import MoveResult, OperationError
from .output import console, printable_text

__all__ = ["confirm", "interruptible", "progress_bar", "report_unreadable"]


def confirm(question: str) -> None:
    """Ask a question; exit unless the answer is yes."""
    try:
        agreed = click.confirm(printable_text(question), err=True)
    except click.Abort:
        click.echo(err=True)
        raise OperationError("Nothing was done: no confirmation. Answer yes, or pass --yes.") from None
    if not agreed:
        click.echo("Nothing was done.", err=True)
        raise click.exceptions.Exit(1)


@contextlib.contextmanager
def progress_bar(activity: str) -> Iterator[Callable[[int, int], object] | None]:
    """Show a progress bar on stderr, if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import Progress

    with Progress(console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(activity, total=None)
        yield lambda seen, total: bar.update(task, completed=seen, total=max(total, seen))


@contextlib.contextmanager
def interruptible(moved: MoveResult, noun: str, done: str) -> Iterator[None]:
    """Report the progress after an interruption or an error."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"Interrupted: {counted(moved.count, noun)} {done}; the rest is unchanged.", err=True)
        raise click.exceptions.Exit(130) from None
    except OperationError as error:
        before = f" {counted(moved.count, noun)} {done} before." if moved.count else ""
        raise OperationError(f"{error}{before}") from None


def report_unreadable(moved: MoveResult) -> None:
    """Report the number of matching messages with unreadable bodies, if any."""
    if moved.unreadable:
        stay = "remains in the queue" if moved.unreadable == 1 else "remain in the queue"
        click.echo(f"{counted(moved.unreadable, 'message')} can't be read and {stay}.", err=True)
