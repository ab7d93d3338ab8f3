"""``dramatiq-policies check``: the production gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..common.plurals import counted
from ..ops import (
    OperationError,
    Report,
    Settings,
    check_live,
    gate,
    load_broker,
    read_baseline,
    read_exemptions,
    require_actors,
    write_baseline,
)
from ..ops.app import PlaceholderBroker
from ..ops.checks.findings import Finding
from ..ops.checks.gate import BASELINE, checked_reason, missing_extra
from .app_command import AppCommand
from .options import format_option, parse_duration, path_option
from .output import console, ignore_broken_pipe, print_json, printable_text

__all__ = ["check"]


@click.command(cls=AppCommand)
@click.argument("app")
@path_option
@format_option("github")
@click.option("--live", is_flag=True, help="Connect to the servers and check their settings too.")
@click.option("--strict", is_flag=True, help="Warnings fail too.")
@click.option("--require-tag", multiple=True, metavar="TAG", help="Every actor must have this tag; repeatable.")
@click.option("--ignore", multiple=True, metavar="CODE", help="Ignore this finding everywhere; needs a --reason.")
@click.option("--reason", multiple=True, metavar="TEXT", help="The reason: one for each --ignore, or one for all.")
@click.option(
    "--write-baseline",
    "writing",
    is_flag=True,
    help="Accept all present findings; later runs fail only on new findings.",
)
@click.option(
    "--baseline", type=click.Path(path_type=Path), default=BASELINE, show_default=True, help="The file of the baseline."
)
@click.option(
    "--worker-shutdown-timeout",
    callback=parse_duration,
    metavar="TIME",
    default="600000",
    show_default="dramatiq's default, 10m",
    help="The value that you pass to dramatiq.",
)
@click.option(
    "--consumer-timeout",
    callback=parse_duration,
    metavar="TIME",
    default="30m",
    show_default=True,
    help="RabbitMQ's consumer_timeout.",
)
def check(
    app: str,
    path: tuple[str, ...],
    form: str,
    live: bool,
    strict: bool,
    require_tag: tuple[str, ...],
    ignore: tuple[str, ...],
    reason: tuple[str, ...],
    writing: bool,
    baseline: Path,
    worker_shutdown_timeout: int,
    consumer_timeout: int,
) -> int:
    """Check whether every actor of APP is ready for production. Exit code 1 if not.

    Imports the application; connects only with --live. Exempt an actor from a finding by policy_exempt={"DP005": "reason"},
    or by [tool.dramatiq_policies.exempt] in pyproject.toml; the output lists exemptions.
    """
    exemptions = read_exemptions(Path("pyproject.toml"))
    exemptions.setdefault("", {}).update(_ignored(ignore, reason))
    settings = Settings(
        required_tags=require_tag, shutdown_timeout_ms=worker_shutdown_timeout, consumer_timeout_ms=consumer_timeout
    )
    known = frozenset() if writing else read_baseline(baseline)
    try:
        broker = load_broker(app, path, stand_in=True)
    except OperationError as error:
        missing = missing_extra(error)
        if missing is None or writing:
            raise
        _show(form, missing, 0, missing.failed(), None)
        return 1
    require_actors(app, broker)
    findings, facts = check_live(broker) if live else ((), None)
    report = gate(broker, settings, exemptions=exemptions, baseline=known, live=findings)
    if writing:
        count = write_baseline(baseline, report)
        click.echo(
            f"{counted(count, 'finding is', 'findings are')} in {baseline} and no longer {'fails' if count == 1 else 'fail'}."
        )
        return 0
    failed = report.failed(strict=strict)
    _show(form, report, len(broker.actors), failed, facts)
    if form == "human" and isinstance(broker, PlaceholderBroker):
        click.echo("The application sets no broker: the actors were declared on a placeholder.", err=True)
    return 1 if failed else 0


def _show(form: str, report: Report, actors: int, failed: bool, facts: dict[str, Any] | None) -> None:
    # The exit code stays the same if the reader of a pipe ends.
    with ignore_broken_pipe():
        if form == "json":
            print_json({**_as_json(report, actors, failed), **({} if facts is None else {"live": facts})})
        elif form == "github":
            for finding in report.findings:
                click.echo(_annotation(finding))
        else:
            _print(report, actors, failed)
            if facts is not None:
                _print_facts(facts)


def _print_facts(facts: dict[str, Any]) -> None:
    seen = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "unknown" and value is not None)
    click.echo(printable_text(f"Read: {seen or 'no server'}."))
    for text in facts["unknown"]:
        click.echo(printable_text(f"Unknown: {text}."))


def _ignored(codes: tuple[str, ...], reasons: tuple[str, ...]) -> dict[str, str]:
    if codes and not reasons:
        raise OperationError("--ignore needs a --reason.")
    if len(reasons) not in (len(codes), 1 if codes else 0):
        raise OperationError(
            f"Got {len(codes)} --ignore and {len(reasons)} --reason: pass one reason for each, or one for all."
        )
    given = dict(zip(codes, reasons if len(reasons) == len(codes) else reasons * len(codes), strict=True))
    for code, reason in given.items():
        checked_reason("--ignore", code, reason)
    return given


def _as_json(report: Report, actors: int, failed: bool) -> dict[str, Any]:
    return {
        "ok": not failed,
        "actors": actors,
        "findings": [finding.asdict() for finding in report.findings],
        "exempt": [finding.asdict() for finding in report.exempt],
        "baseline": [finding.asdict() for finding in report.baseline],
        "fixed": [{"code": code, "actor": actor} for code, actor in report.fixed],
    }


def _annotation(finding: Finding) -> str:
    """Return an annotation for GitHub to show beside the source."""
    text = (
        f"{finding.actor}: {finding.message}. {finding.fix}." if finding.actor else f"{finding.message}. {finding.fix}."
    )
    where = "" if finding.file is None else f"file={_escaped(finding.file)},line={finding.line},"
    return f"::{finding.severity} {where}title={finding.code}::{_escaped(printable_text(text, lines=True), value=True)}"


def _escaped(text: str, *, value: bool = False) -> str:
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text if value else text.replace(":", "%3A").replace(",", "%2C")


def _print(report: Report, actors: int, failed: bool) -> None:
    out = console()
    last: Any = object()
    for finding in sorted(
        report.findings, key=lambda f: (f.actor is not None, f.file or "", f.line or 0, f.actor or "")
    ):
        if finding.actor != last:
            place = "" if finding.file is None else f"  {finding.file}:{finding.line}"
            out.print(printable_text(finding.actor or "the broker"), style="bold", end="")
            out.print(printable_text(place), style="dim")
            last = finding.actor
        out.print(f"  {finding.code} ", style="red" if finding.severity == "error" else "yellow", end="")
        out.print(printable_text(f"{finding.severity}: {finding.message}. {finding.fix}."))
    for title, listed in (("Exempt", report.exempt), ("In the baseline", report.baseline)):
        if listed:
            out.print(f"{title}:", style="bold")
        for finding in listed:
            why = "" if finding.exempt is None else f": {finding.exempt}"
            out.print(printable_text(f"  {finding.code} {finding.actor or 'the broker'}{why}"), style="dim")
    if report.fixed:
        out.print(
            f"{counted(len(report.fixed), 'entry of the baseline is', 'entries of the baseline are')} "
            "fixed. Write the baseline again, so that they fail if they return."
        )
    errors = sum(finding.severity == "error" for finding in report.findings)
    warnings = len(report.findings) - errors
    verdict = "Not ready" if failed else "Ready"
    out.print(
        f"{verdict}: {counted(actors, 'actor')}, {counted(errors, 'error')}, {counted(warnings, 'warning')}, "
        f"{len(report.exempt)} exempt.",
        style="bold red" if failed else "bold green",
    )
