"""``dramatiq-policies keys``: show and delete idempotency records."""

from __future__ import annotations

from dataclasses import asdict

import click

from .. import ops
from ..common.durations import format_duration
from .app_command import AppCommand
from .changes import confirm
from .help import WholeSummaries
from .options import format_option, path_option
from .output import print_json, print_table, printable_text, timestamp

__all__ = ["keys"]


@click.group(cls=WholeSummaries)
def keys() -> None:
    """Show or delete the idempotency record of a job. Name the job by its arguments.

    ARGS are JSON or text (42, ada@example.com, '"42"'), or name=value; for an actor with idempotent=True, a message id.
    """


@keys.command(cls=AppCommand)
@click.argument("actor")
@click.argument("args", nargs=-1)
@path_option
@format_option()
def show(actor: str, args: tuple[str, ...], path: tuple[str, ...], form: str) -> None:
    """Show whether the job of ACTOR (app:actor) with ARGS has run or is running."""
    found = ops.find_actor(actor, path)
    given, named = ops.read_arguments(found, args)
    state = ops.key_state(found, *given, **named)
    if form == "json":
        print_json(asdict(state))
        return
    rows = {
        "state": state.state,
        "key": state.key,
        "message": state.message_id,
        "owner": state.owner,
        "since": None if state.since is None else timestamp(state.since),
        "starts": state.starts,
        "left": None if state.left_ms is None else format_duration(state.left_ms),
    }
    print_table(["", ""], [(name, value) for name, value in rows.items() if value is not None])


@keys.command(cls=AppCommand)
@click.argument("actor")
@click.argument("args", nargs=-1)
@click.option("-y", "--yes", is_flag=True, help="Don't ask before you forget a running job.")
@path_option
def forget(actor: str, args: tuple[str, ...], yes: bool, path: tuple[str, ...]) -> None:
    """Delete the record of the job of ACTOR with ARGS, so that the next message runs."""
    found = ops.find_actor(actor, path)
    given, named = ops.read_arguments(found, args)
    state = ops.key_state(found, *given, **named)
    if state.state == "none":
        click.echo(printable_text(f"There is no record of {state.key}."))
        return
    if state.state == "running" and not yes:
        confirm(f"Forget {state.key}? The job is running; a second run may start beside it.")
    ops.forget_key(found, *given, **named)
    click.echo(printable_text(f"Forgot {state.key} (it was {state.state})."))
