"""The commands in the guides exist, and the sessions shown were really had."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import click
import pytest

from dramatiq_policies import KeyState
from dramatiq_policies.cli import main

from .test_dead import APP as DEAD_APP

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))]
LINE = re.compile(r"^(?:\$ |- run: |\s*entry: )?(dramatiq-policies .*?)(?:  +#.*)?$", re.MULTILINE)
SESSION = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
#: Parts that differ from run to run.
VARIES = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\S*|[0-9a-f]{8}-[0-9a-f-]{27}| +\d+ ms$", re.MULTILINE)


def commands():
    for page in PAGES:
        for found in LINE.finditer((ROOT / page).read_text()):
            yield pytest.param(found[1], id=f"{page}: {found[1]}")


def test_there_are_commands_in_the_guides():
    assert len(list(commands())) > 15


@pytest.mark.parametrize("line", list(commands()))
def test_each_command_in_the_guides_exists_with_its_options(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "design.toml").touch()
    command: click.Command = main
    args = shlex.split(line)[1:]
    while isinstance(command, click.Group):
        # `queues app` is `queues show app`.
        name = args.pop(0) if args[0] in command.commands else "show"
        command = command.commands[name]
    command.make_context(command.name, args)


def test_the_fields_that_programs_read_are_those_that_are_printed(command):
    text = (ROOT / "docs" / "operating.md").read_text().partition("## For programs")[2]
    rows = dict(re.findall(r"^\| (.*?) \| (.*) \|$", text, re.MULTILINE))
    app = command.app(DEAD_APP)
    shown = {
        "`check`": command.json("check", app, "--live", code=1),
        "`explain` with an error": command.json("explain", f"{app}:send_mail", "ValueError")[0],
        "`explain` without": command.json("explain", f"{app}:send_mail"),
        "`dead summary`": command.json("dead", "summary", app)[0],
        "`dead list`": command.json("dead", "list", app)[0],
        "`dead replay`, `purge`, `queues move`": command.json("dead", "replay", app, "--dry-run"),
        "`queues`": command.json("queues", app)[0],
        "`keys show`": asdict(KeyState(state="none", key="")),
    }
    for command_, fields in shown.items():
        written = set(re.findall(r"\b[a-z_]+\b", rows[command_]))
        assert set(fields) <= written, command_


def sessions():
    """Each command with the output that the guide shows; those without one are recipes."""
    for session in SESSION.findall((ROOT / "docs" / "operating.md").read_text()):
        for part in re.split(r"^\$ ", session, flags=re.MULTILINE)[1:]:
            line, _, output = part.partition("\n")
            if output.strip():
                yield line, output.strip("\n")


SCRIPT = """
import logging, shlex, sys
from click.testing import CliRunner
from dramatiq_policies.cli import main
from dramatiq_policies.testing import drain
from examples.orders import app, produce
logging.disable()
produce.produce(3)
drain(app.broker)
app.gateway.api_key = None  # Somebody has forgotten it.
app.send_confirmation.send(8_001, "ada@example.com", "9.00")
drain(app.broker)
for line in sys.argv[1:]:
    result = CliRunner().invoke(main, shlex.split(line)[1:])
    print(result.output.rstrip("\\n"), end="\\0")
"""


def test_the_sessions_in_the_guide_were_really_had():
    wanted = dict(sessions())
    assert len(wanted) >= 4
    here = {"BROKER_URL": "stub://", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, *wanted],
        cwd=ROOT,
        env={**os.environ, **here},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    for line, got in zip(wanted, ran.stdout.split("\0"), strict=False):
        assert VARIES.sub("*", got) == VARIES.sub("*", wanted[line]), line
