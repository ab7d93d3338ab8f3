"""Print texts, tables and JSON, without credentials and terminal controls."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import click
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .. import ops
from ..common.credentials import is_secret_name
from ..common.texts import UNPRINTABLE, printable

__all__ = [
    "as_json",
    "console",
    "escape_unencodable",
    "ignore_broken_pipe",
    "print_json",
    "print_json_stream",
    "print_table",
    "printable_text",
    "table",
    "timestamp",
]


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # Rich would end the process.
        raise BrokenPipeError


@contextlib.contextmanager
def ignore_broken_pipe() -> Iterator[None]:
    """Stop printing without an error if the reader of a pipe ends (``| head``)."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def escape_unencodable() -> None:
    """Print characters outside the encoding of stdout and stderr as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def console(*, stderr: bool = False) -> Console:
    """Return a console as wide as the terminal; for a pipe so wide that no line is wrapped."""
    stream = sys.stderr if stderr else sys.stdout
    return _Console(
        file=stream,
        width=None if stream.isatty() else 10_000,
        highlight=False,
        markup=False,
        emoji=False,
    )


#: Line ends between values stay; JSON escapes line ends in texts.
_NOT_IN_JSON = re.compile(f"(?!\\n)[{UNPRINTABLE}]")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Sequence[str] = ()) -> Table:
    """Return a table without a frame, for ``cut`` and ``awk``."""
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
    """Print a table, or blocks if the table is wider than the terminal."""
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
    """Print a block for each row, a line for each value, without breaking names."""
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
    """Return a value as text without credentials and terminal controls, on one line unless ``lines`` is true."""
    return printable(ops.redact(str(value)), lines=lines)


def as_json(value: object, indent: int | None = None) -> str:
    """Return a value as JSON without credentials; in ASCII if stdout can't encode the text."""
    text = _dumped(value, indent, ascii_only=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = _dumped(value, indent, ascii_only=True)
    return text


def _dumped(value: object, indent: int | None, *, ascii_only: bool) -> str:
    text = json.dumps(_redacted(value), indent=indent, ensure_ascii=ascii_only, default=str)
    return _NOT_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _redacted(value: object) -> Any:
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


def print_json(value: object) -> None:
    """Print a JSON document."""
    click.echo(as_json(value, 2))


def print_json_stream(values: Iterable[Any]) -> None:
    """Print a JSON array, an element per line, each as soon as it is read."""
    opening = "["
    for value in values:
        click.echo(f"{opening}\n{as_json(value)}", nl=False)
        opening = ","
    click.echo("[]" if opening == "[" else "\n]")


def timestamp(ms: Any) -> str:
    """Format ms since the epoch as local date, time and zone; ``-`` for an invalid value."""
    try:
        when = datetime.fromtimestamp(ms / 1_000).astimezone()
        zone = when.strftime("%z")
        return f"{when:%Y-%m-%d %H:%M:%S}{'Z' if zone == '+0000' else zone[:3] + ':' + zone[3:5]}"
    except (TypeError, ValueError, OverflowError, OSError):
        return "-"
