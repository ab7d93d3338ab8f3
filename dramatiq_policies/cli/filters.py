"""Options to select dead letters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from dramatiq.broker import Broker

from .. import ops
from ..common.callables import stated_signature, unwrapped
from .app_command import load_app
from .completion import actor_names, queue_names
from .options import parse_duration, parse_tags, path_option
from .output import printable_text

__all__ = ["filters", "parse_filters", "report_nothing_found"]

F = TypeVar("F", bound=Callable[..., Any])


def filters(command: F) -> F:
    """Add the options to select dead letters."""
    for option in reversed(
        [
            click.argument("app"),
            path_option,
            click.option(
                "-q",
                "--queue",
                "queues",
                multiple=True,
                shell_complete=queue_names,
                help="Only this queue; repeatable.",
            ),
            click.option("--actor", shell_complete=actor_names, help="Only this actor."),
            click.option("--error", help="Only this exception: dotted path, class name, or part of the text."),
            click.option(
                "--outcome", type=click.Choice(["dead", "alerted", "expired", "discarded"]), help="Only this outcome."
            ),
            click.option("--reason", help="Only this reason: exhausted, unclassified, crashed, …"),
            click.option("--tag", "tags", multiple=True, metavar="NAME=VALUE", help="Only this tag; repeatable."),
            click.option(
                "--id",
                "message_ids",
                multiple=True,
                metavar="ID",
                help="Only this message id, or ids with this beginning; repeatable.",
            ),
            click.option(
                "--where",
                "arguments",
                multiple=True,
                metavar="ARG=VALUE",
                help="Only this argument; VALUE is text or JSON, ARG a name, a position (0), or order.id; repeatable.",
            ),
            click.option(
                "--older-than",
                callback=parse_duration,
                metavar="TIME",
                help="Only failures older than this, such as 2h or 7d.",
            ),
            click.option(
                "--newer-than",
                callback=parse_duration,
                metavar="TIME",
                help="Only failures newer than this, such as 30m.",
            ),
        ]
    ):
        command = option(command)
    return command


def parse_filters(
    app: str,
    path: tuple[str, ...],
    queues: tuple[str, ...],
    actor: str | None,
    error: str | None,
    outcome: str | None,
    reason: str | None,
    tags: tuple[str, ...],
    message_ids: tuple[str, ...],
    arguments: tuple[str, ...],
    older_than: int | None,
    newer_than: int | None,
) -> tuple[Broker, tuple[str, ...], ops.Tally]:
    """Return the broker, the queues and the filter from the options."""
    broker = load_app(app, path)
    where = ops.Filter(
        actor=actor,
        outcome=outcome,
        reason=reason,
        error=error,
        tags=parse_tags(tags),
        message_ids=ops.resolve_ids(broker, queues, message_ids),
        arguments=parse_tags(arguments, "an argument"),
        parameters=_parameters(broker) if arguments else {},
        older_than_ms=older_than,
        newer_than_ms=newer_than,
    )
    return broker, queues, ops.Tally(where)


def _parameters(broker: Broker) -> dict[str, tuple[str, ...]]:
    return {
        name: tuple(signature.parameters)
        for name, actor in broker.actors.items()
        if (signature := stated_signature(unwrapped(actor.fn))) is not None
    }


def report_nothing_found(broker: Broker, where: ops.Tally) -> None:
    """Report a filter without a match, with the nearest name, and exit with 1. Return if there are no dead letters at
    all."""
    sentence = where.no_match(broker.actors)
    if sentence is not None:
        click.echo(printable_text(sentence), err=True)
        raise click.exceptions.Exit(1)
