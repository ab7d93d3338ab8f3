"""``dramatiq-policies explain``: which rule, when, and where the message ends up."""

from __future__ import annotations

from typing import Any

import click

from .. import ops
from .app_command import AppCommand
from .base import console, duration, format_option, path_option, print_json, print_table, printable_text

__all__ = ["explain"]


@click.command(cls=AppCommand)
@click.argument("actor")
@click.argument("exception", required=False)
@path_option
@format_option()
def explain(actor: str, exception: str | None, path: tuple[str, ...], form: str) -> None:
    """What becomes of a message of ACTOR (app:actor) whose job raises EXCEPTION; without one, the actor's whole policy.

    EXCEPTION is module:Class, module.Class, or a bare name that the actor's module, its rules or Python know.
    """
    found = ops.find_actor(actor, path, stand_in=True)
    if exception is None:
        summary = ops.describe(found)
        if form == "json":
            print_json(summary.asdict())
        else:
            _print_summary(summary)
        return
    answers = ops.explain(found, ops.find_exception(found, exception))
    if form == "json":
        print_json([answer.asdict() for answer in answers])
    else:
        for answer in answers:
            _print_answer(answer)


def _print_summary(summary: ops.ActorSummary) -> None:
    out = console()
    out.print(printable_text(summary.actor), style="bold", end="")
    out.print(f" on {summary.queue}" + ("" if summary.file is None else f", {summary.file}:{summary.line}"))
    if summary.purpose:
        out.print(printable_text(summary.purpose, lines=True))
    out.print()
    if summary.rules:
        print_table(
            ["verb", "error", "only if", "attempts", "wait", "then", "declared by"],
            [
                [rule[name] for name in ("verb", "error", "only_if", "attempts", "wait", "then", "owner")]
                for rule in summary.rules
            ],
            right=["attempts"],
        )
        out.print()
    print_table(["", ""], summary.facts.items())


_SAYS = {
    "retried": "retried",
    "discarded": "discarded",
    "alerted": "alerted",
    "dead": "dead",
    "deferred": "put back for later",
    "interrupted": "put back at once",
}


def _print_answer(answer: ops.Explanation) -> None:
    out = console()
    out.print(f"{answer.exception.removeprefix('builtins.')} in {answer.actor}: ", style="bold", end="")
    out.print(_SAYS[answer.outcome], style="bold", end="")
    out.print("" if answer.only_if is None else f", if {answer.only_if} holds")
    out.print(f"  because {answer.why}" + ("" if answer.rule is None else f" (rule {answer.rule})"))
    if len(answer.attempts) > 1:
        print_table(["  attempt", "starts after", "at the latest after"], [_row(one) for one in answer.attempts])
    if not answer.complete:
        out.print("  how often and when can't be told beforehand")
    if answer.outcome == "retried":
        out.print(f"  then {answer.ending} ({answer.reason}): ", end="")
    else:
        out.print("  it is then ", end="")
    out.print(f"in {answer.where_it_ends}" if answer.where_it_ends != "gone" else "gone")
    if answer.longest_ms is not None:
        out.print(f"  at most {duration(answer.longest_ms)} from its first start, if each run takes its whole timeout")


def _row(attempt: ops.Attempt) -> list[Any]:
    return [f"  {attempt.number}", duration(attempt.earliest_ms), duration(attempt.latest_ms)]
