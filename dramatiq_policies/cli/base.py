"""What the commands share: how an application is named, and how results are printed."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .. import ops
from ..common.credentials import is_secret_name
from ..common.texts import UNPRINTABLE, printable
from ..ops import MoveResult, OperationError

__all__ = [
    "as_json",
    "confirm",
    "console",
    "counted",
    "duration",
    "escape_unencodable",
    "finite",
    "format_option",
    "ignore_broken_pipe",
    "interruptible",
    "parse_duration",
    "parse_tags",
    "path_option",
    "print_json",
    "print_json_stream",
    "print_table",
    "printable_text",
    "progress_bar",
    "report_unreadable",
    "table",
    "timestamp",
]

F = TypeVar("F", bound=Callable[..., Any])


def path_option(command: F) -> F:
    """``--path``, as dramatiq has it."""
    return click.option(
        "-P",
        "--path",
        multiple=True,
        default=(".",),
        show_default="the current folder",
        help="Look for modules here first; may be repeated.",
    )(command)


def format_option(*more: str) -> Callable[[F], F]:
    """``--format human|json``, and what else a command can print."""
    return click.option(
        "--format", "form", type=click.Choice(["human", "json", *more]), default="human", help="What to print."
    )


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # Rich would end the process.
        raise BrokenPipeError


@contextlib.contextmanager
def ignore_broken_pipe() -> Iterator[None]:
    """Whoever reads our output may stop reading at any time (``| head``); what is left of it is then not said."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def escape_unencodable() -> None:
    """Have stdout and stderr write a character that their encoding has not as its escape, rather than raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def console(*, stderr: bool = False) -> Console:
    """A console of the terminal's width; into a pipe, of one so large that nothing is wrapped or cut."""
    stream = sys.stderr if stderr else sys.stdout
    return _Console(
        file=stream,
        width=None if stream.isatty() else 10_000,
        highlight=False,
        markup=False,
        emoji=False,
    )


#: Line ends between values stay; those in texts are escaped by JSON itself.
_NOT_IN_JSON = re.compile(f"(?!\\n)[{UNPRINTABLE}]")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Sequence[str] = ()) -> Table:
    """A table without a frame, whose lines a pipe can cut into columns."""
    made = Table(
        show_header=any(columns),
        box=None,
        pad_edge=False,
        header_style="bold",
        collapse_padding=True,
        padding=(0, 2, 0, 0),
    )
    for column in columns:
        number = column in right
        made.add_column(column, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in rows:
        made.add_row(
            *("-" if cell is None else cell if isinstance(cell, Text) else Text(printable_text(cell)) for cell in row)
        )
    return made


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Sequence[str] = ()) -> None:
    """Print such a table."""
    out = console()
    rows = [list(row) for row in rows]
    made = table(columns, rows, right=right)
    if out.is_terminal:
        if Measurement.get(out, out.options.update(max_width=100_000), made).maximum > out.width:
            _stack(out, columns, rows)
        else:
            out.print(made)
        return
    with out.capture() as captured:
        out.print(made)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def _stack(out: Console, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """What is too wide for a table: one block for each row, a line for each value, no name broken."""
    margin = max((len(column) for column in columns), default=0)
    for row in rows:
        for column, cell in zip(columns, row, strict=False):
            if cell is not None or not column:
                value = cell if isinstance(cell, Text) else Text(printable_text("-" if cell is None else cell))
                out.print(
                    Text(f"{column:{margin}}  " if column else "", style="bold"),
                    value,
                    sep="",
                    no_wrap=True,
                    overflow="ignore",
                    crop=False,
                )
        if len(columns) > 2 or any(columns):
            out.print()


def printable_text(value: object, *, lines: bool = False) -> str:
    """A value as it may be printed: on one line, unless ``lines`` may stay, without credentials, nothing that a terminal obeys."""
    return printable(ops.redact(str(value)), lines=lines)


def as_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON, without credentials in its texts; in ASCII where stdout can't write what is in it."""
    text = _dumped(value, indent, ascii_only=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = _dumped(value, indent, ascii_only=True)
    return text


def _dumped(value: Any, indent: int | None, *, ascii_only: bool) -> str:
    text = json.dumps(_redacted(value), indent=indent, ensure_ascii=ascii_only, default=str)
    return _NOT_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return ops.redact(value)
    if isinstance(value, Mapping):
        return {
            name: "***" if isinstance(one, str) and is_secret_name(name) else _redacted(one)
            for name, one in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_redacted(one) for one in value]
    return value


def print_json(value: Any) -> None:
    """One JSON document."""
    click.echo(as_json(value, 2))


def print_json_stream(values: Iterable[Any]) -> None:
    """A JSON array, an element a line, each printed as soon as it is there."""
    opening = "["
    for value in values:
        click.echo(f"{opening}\n{as_json(value)}", nl=False)
        opening = ","
    click.echo("[]" if opening == "[" else "\n]")


def duration(ms: float | None) -> str:
    """Milliseconds as a person says them: ``850 ms``, ``1.5 s``, ``2 m 5 s``, ``3 h 20 m``, ``7 d``."""
    if ms is None:
        return "-"
    if ms < 1_000:
        return f"{ms:.0f} ms"
    seconds = ms / 1_000
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    units = ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "m"), (60, "m", 1, "s"))
    size, unit, smaller, name = next(row for row in units if whole >= row[0])
    rest = whole % size // smaller
    return f"{whole // size} {unit} {rest} {name}" if rest else f"{whole // size} {unit}"


def timestamp(ms: Any) -> str:
    """A time in ms since the epoch as local date, time and zone; anybody may have written it, and what is none is ``-``."""
    try:
        when = datetime.fromtimestamp(ms / 1_000).astimezone()
        zone = when.strftime("%z")
        return f"{when:%Y-%m-%d %H:%M:%S}{'Z' if zone == '+0000' else zone[:3] + ':' + zone[3:5]}"
    except (TypeError, ValueError, OverflowError, OSError):
        return "-"


_UNITS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def parse_duration(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """The callback of an option that is a length of time: ``90s``, ``30m``, ``2h``, ``7d``, or milliseconds."""
    if value is None:
        return None
    text = value.strip().lower()
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
    try:
        ms = round(float(number) * _UNITS[text[len(number) :].strip() or "ms"])
        if ms < 0:
            raise ValueError
    except (KeyError, ValueError, OverflowError):
        raise click.BadParameter(f"{value!r} is no length of time; write 90s, 30m, 2h or 7d.", ctx, param) from None
    return ms


def finite(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """The callback of an option that is a number, and neither infinite nor none."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no number to go by.", ctx, param)
    return value


def parse_tags(tags: Sequence[str], what: str = "a tag") -> dict[str, str]:
    """``name=value`` options as a mapping.

    Raises:
      OperationError: If one has no ``=``.
    """
    parsed = {}
    for tag in tags:
        name, found, value = tag.partition("=")
        if not found:
            raise OperationError(f"{tag!r} is not {what}; write name=value.")
        parsed[name] = value
    return parsed


@contextlib.contextmanager
def interruptible(moved: MoveResult, what: str, done: str) -> Iterator[None]:
    """Say how far it came, whatever ends it."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"Interrupted: {counted(moved.count, what)} {done}; the rest is where it was.", err=True)
        raise click.exceptions.Exit(130) from None
    except OperationError as error:
        before = f" {counted(moved.count, what)} {done} before." if moved.count else ""
        raise OperationError(f"{error}{before}") from None


def counted(number: int, what: str) -> str:
    """``1 actor``, ``2 actors``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def report_unreadable(moved: MoveResult) -> None:
    """Say how many were meant and could not be read, if there were some."""
    if moved.unreadable:
        stay = "stays where it is" if moved.unreadable == 1 else "stay where they are"
        click.echo(f"{counted(moved.unreadable, 'message')} can't be read and {stay}.", err=True)


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], object] | None]:
    """A bar on stderr, if somebody is looking."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import Progress

    with Progress(console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda seen, total: bar.update(task, completed=seen, total=max(total, seen))


def confirm(question: str) -> None:
    """Go on only if somebody says yes."""
    try:
        agreed = click.confirm(printable_text(question), err=True)
    except click.Abort:
        click.echo(err=True)
        raise OperationError("Nothing was done: nobody said yes, and there is no --yes.") from None
    if not agreed:
        click.echo("Nothing was done.", err=True)
        raise click.exceptions.Exit(1)
