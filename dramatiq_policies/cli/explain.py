"""``dramatiq-policies explain``: show the deciding rule, the schedule of retries and the end."""

from __future__ import annotations

from typing import Any

import click

from .. import ops
from ..common.durations import format_duration
from ..ops.durations import describe_wait
from .app_command import AppCommand
from .options import format_option, path_option
from .output import console, print_json, print_table, printable_text

__all__ = ["explain"]


@click.command(cls=AppCommand)
@click.argument("actor")
@click.argument("exception", required=False)
@path_option
@format_option()
def explain(actor: str, exception: str | None, path: tuple[str, ...], form: str) -> None:
    """Show how ACTOR (app:actor) handles EXCEPTION; without EXCEPTION, the actor's whole policy.

    EXCEPTION is module:Class, module.Class, or a bare name from the actor's module, its rules or Python.
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
    place = "" if summary.file is None else f", {summary.file}:{summary.line}"
    out.print(printable_text(f" on {summary.queue}{place}"))
    if summary.purpose:
        out.print(printable_text(summary.purpose, lines=True))
    out.print()
    if summary.rules:
        print_table(
            ["verb", "error", "only if", "attempts", "wait", "then", "declared by"],
            [
                [
                    describe_wait(rule[name]) if name == "wait" and rule[name] else rule[name]
                    for name in ("verb", "error", "only_if", "attempts", "wait", "then", "owner")
                ]
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
    "deferred": "deferred (runs later)",
    "interrupted": "requeued at once",
}


def _print_answer(answer: ops.Explanation) -> None:
    out = console()
    out.print(printable_text(f"{answer.exception.removeprefix('builtins.')} in {answer.actor}: "), style="bold", end="")
    out.print(_SAYS[answer.outcome], style="bold", end="")
    out.print("" if answer.only_if is None else printable_text(f", if {answer.only_if} holds"))
    rule = "" if answer.rule is None else f" (rule {answer.rule})"
    out.print(printable_text(f"  because {answer.why}{rule}"))
    if len(answer.attempts) > 1:
        print_table(["  attempt", "starts after", "at the latest after"], [_row(one) for one in answer.attempts])
    if not answer.complete:
        out.print("  number and times of the attempts: not known in advance")
    if answer.outcome == "retried":
        out.print(f"  then {answer.ending} ({answer.reason}): ", end="")
    else:
        out.print("  the message is then ", end="")
    out.print(printable_text(f"in {answer.where_it_ends}") if answer.where_it_ends != "gone" else "gone")
    if answer.longest_ms is not None:
        out.print(
            f"  at most {format_duration(answer.longest_ms)} after the first start, if each run takes the whole timeout"
        )


def _row(attempt: ops.Attempt) -> list[Any]:
    return [f"  {attempt.number}", format_duration(attempt.earliest_ms), format_duration(attempt.latest_ms)]
