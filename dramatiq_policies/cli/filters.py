"""The options that say which dead letters are meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from dramatiq.broker import Broker

from .. import ops
from .base import length, parse_tags, path_option
from .completion import actor_names, queue_names

__all__ = ["check_actor_name", "chosen", "filters"]

F = TypeVar("F", bound=Callable[..., Any])


def filters(command: F) -> F:
    """The options that say which dead letters are meant."""
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
                help="Only of this queue; may be repeated.",
            ),
            click.option("--actor", shell_complete=actor_names, help="Only of this actor."),
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


def chosen(
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
    """The broker, the queues and the filter that those options say."""
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


def check_actor_name(broker: Broker, where: ops.Filter) -> None:
    """Nothing was found: perhaps the actor's name is wrong."""
    if where.actor is not None and where.actor not in broker.actors:
        raise ops.OperationError(f"There is no actor {where.actor!r}{ops.meant(where.actor, broker.actors)}")
