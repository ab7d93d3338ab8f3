"""Options of several commands, and the values of options."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from ..common.durations import looks_like_seconds
from ..ops import OperationError, durations

__all__ = ["expect_finite", "format_option", "parse_duration", "parse_tags", "path_option"]

F = TypeVar("F", bound=Callable[..., Any])


def path_option(command: F) -> F:
    """Add ``--path``, as in the dramatiq command."""
    return click.option(
        "-P",
        "--path",
        multiple=True,
        default=(".",),
        show_default="the current folder",
        help="Import modules from this folder first; repeatable.",
    )(command)


def format_option(*more: str) -> Callable[[F], F]:
    """Add ``--format human|json``, and further formats of a command."""
    return click.option(
        "--format", "form", type=click.Choice(["human", "json", *more]), default="human", help="Output format."
    )


def parse_duration(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Read the value of an option: ``90s``, ``30m``, ``2h``, ``7d``, or milliseconds."""
    if value is None:
        return None
    try:
        duration = durations.parse_duration(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a duration; write 90s, 30m, 2h or 7d.", ctx, param) from None
    if value.strip()[-1:].isdigit() and looks_like_seconds(param.opts[0], duration):
        click.echo(f"{param.opts[0]} {value} is {value} milliseconds. For seconds write {value}s.", err=True)
    return duration


def expect_finite(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Refuse infinity and NaN as an option's value."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number.", ctx, param)
    return value


def parse_tags(tags: Sequence[str], noun: str = "a tag") -> dict[str, str]:
    """Parse ``name=value`` options.

    Raises:
      OperationError: An option has no ``=``.
    """
    parsed = {}
    for tag in tags:
        name, found, value = tag.partition("=")
        if not found:
            raise OperationError(f"{tag!r} is not {noun}; write NAME=VALUE.")
        parsed[name] = value
    return parsed
