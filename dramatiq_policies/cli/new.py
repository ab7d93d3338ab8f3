"""``dramatiq-policies new``: write the rules and failing tests of a job from its design."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ..common.durations import looks_like_seconds
from ..ops import IncompleteDesign, parse_design, scaffold
from ..ops.app import extend_path
from ..ops.checks.gate import read_toml
from ..ops.scaffolding.scaffold import new_module
from .options import path_option
from .output import printable_text

__all__ = ["new"]


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--design",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Read the answers from this TOML file.",
)
@click.option(
    "--tests",
    type=click.Path(path_type=Path, file_okay=False),
    default="tests",
    show_default=True,
    help="The folder of the tests.",
)
@path_option
def new(file: Path, design: Path | None, tests: Path, path: tuple[str, ...]) -> int:
    """Design a job, and write its rules into FILE (shop/jobs/send_confirmation.py) and its tests into the tests'
    folder.

    Asks for each answer and shows an example, or reads a TOML file with the tables [job] and [errors]. Refuses an
    incomplete design and lists the missing answers. The tests fail until you write the job. Never overwrites a file.
    """
    _, test_file = new_module(file, tests)
    extend_path(path)
    try:
        parsed = parse_design(_ask() if design is None else read_toml(design))
    except IncompleteDesign as error:
        click.echo(printable_text(error, lines=True), err=True)
        return 1
    if looks_like_seconds("timeout", parsed.timeout):
        hint = f"job.timeout={parsed.timeout} is {parsed.timeout} milliseconds. For seconds write thousands: 30000."
        click.echo(hint, err=True)
    for written in scaffold(parsed, file, tests):
        click.echo(printable_text(f"wrote {written}"))
    click.echo(printable_text(f"Now write the job, until its tests pass: python -m pytest {test_file}"))
    return 0


def _ask() -> dict[str, Any]:
    """Ask the questions, each with an example; at the end of the input, return the answers so far."""
    click.echo(
        "Answer these questions before you write the job. Separate items by commas; leave a list empty for none.\n"
    )
    job: dict[str, Any] = {}
    errors: dict[str, Any] = {}
    try:
        _ask_for(job, errors)
    except click.Abort:
        if sys.stdin.isatty():
            raise
        click.echo(err=True)
    return {"job": job, "errors": errors}


def _ask_for(job: dict[str, Any], errors: dict[str, Any]) -> None:
    job["purpose"] = _text("What is the job for, in one sentence?", "the customer learns that the order was taken")
    job["trigger"] = _text("What sends the message, and after which commit?", "the checkout, after its transaction")
    job["input"] = _items("Which arguments? Ids and plain values, never objects", "order_id: int, email: str")
    job["effect"] = _text("What has changed in the world afterwards?", "one e-mail")
    job["criticality"] = _text("How bad is it if the job does not run?", "high", default="normal")
    job["queue"] = _text("Which queue? Which jobs must it not wait behind?", "mail")
    job["timeout"] = click.prompt(
        "After how many ms is the job stuck, and not only slow?", type=int, default=30_000, err=True
    )
    key = click.prompt(
        _example(
            "What makes a second run harmless? A key made of arguments, or empty for the message id",
            "order:{order_id}",
        ),
        default="",
        show_default=False,
        err=True,
    )
    job.update({"idempotency_key": key} if key else {"idempotent": True})
    errors["transient"] = _items("Which errors are transient (retried)?", "shop.mail:Timeout, ConnectionError")
    errors["permanent"] = _items("Which errors are permanent (discarded)?", "shop.mail:InvalidEmail")
    errors["configuration"] = _items("Which errors need a person (alert)?", "shop.mail:MissingCredentials")


def _example(question: str, example: str) -> str:
    return f"{question}\n  e.g. {example}\n "


def _text(question: str, example: str, default: str | None = None) -> str:
    return str(click.prompt(_example(question, example), default=default, err=True))


def _items(question: str, example: str) -> list[str]:
    given = click.prompt(_example(question, example), default="", show_default=False, err=True)
    return [item.strip() for item in given.split(",") if item.strip()]
