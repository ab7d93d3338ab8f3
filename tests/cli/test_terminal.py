"""Output to a terminal, a pipe and a shell: no secrets, no control characters, completed names."""

from __future__ import annotations

import json
import os
import pty
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from dramatiq_policies.cli import main
from dramatiq_policies.cli.output import table

from .test_check import PREPARED
from .test_command import run
from .test_dead import APP

ROOT = Path(__file__).parents[2]
MANY = APP + "for n in range(3_000): bury(send_mail, f'x{n}')\n"
HOSTILE = APP + (
    "bury(send_mail, 'evil\\x1b[2J', exception='app.\\x1b]0;gone\\x07', text='at \\x9b31m redis://u:pass@h/\\x1b[31m')\n"
)


def test_the_error_of_a_broker_s_url_shows_no_password(command):
    broker = (
        'from dramatiq.brokers.redis import RedisBroker\nbroker = RedisBroker(url="redis://u:s3c/r3t@127.0.0.1:1/0")\n'
    )
    app = command.app("", broker=broker)
    line = command.refuses("check", app)
    assert "s3c" not in line
    assert line.endswith(f"({app}.py, line 7)")


@pytest.mark.parametrize("form", ["human", "json"])
def test_no_message_controls_the_terminal_or_shows_a_password(command, form):
    app = command.app(HOSTILE)
    for args in (["list", app], ["summary", app], ["show", app, "evil\x1b[2J", "--args"]):
        shown = command("dead", *args, "--format", form)
        assert shown.exit_code == 0
        assert not set("\x1b\x07\x9b") & set(shown.output)
        assert "pass@" not in shown.output


FORGED = APP + (
    "bury(send_mail, 'a\\n2026-01-01 forged', text='no\\nforged \\u202etxt \\u2066 \\ud83d 東京', exception='app.E\\nforged')\n"
)


def test_no_message_forges_a_line_of_a_list(command):
    app = command.app(FORGED)
    honest = command("dead", "list", command.app(APP)).stdout.splitlines()
    listed = command("dead", "list", app)
    assert len(listed.stdout.splitlines()) == len(honest) + 1
    assert not set("\u202e\u2066\ud83d") & set(listed.stdout)
    for args in (["summary"], ["show", "a\n2026-01-01 forged"], ["show", r"a\n2026-01-01 forged"]):
        shown = command("dead", args[0], app, *args[1:])
        assert shown.exit_code == 0
        assert not any(
            line.startswith(("forged", "2026-01-01 forged"))
            for line in shown.stdout.partition("Traceback")[0].splitlines()
        )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252"])
@pytest.mark.parametrize("form", ["human", "json"])
def test_a_list_is_complete_in_any_encoding_of_stdout(command, encoding, form):
    name = command.app(FORGED)
    done = CliRunner(charset=encoding).invoke(main, ["dead", "list", name, "--format", form])
    assert (done.exit_code, done.stderr_bytes) == (0, b"")
    # Click takes a stdout in ASCII for one in UTF-8 that nobody has configured.
    text = done.stdout_bytes.decode("utf-8" if encoding == "ascii" else encoding)
    assert not set("\u202e\u2066\ud83d") & set(text)
    if form == "json":
        assert any("東京" in str(letter["text"]) for letter in json.loads(text))
    else:
        assert ("東京" if encoding in ("utf-8", "ascii") else r"\u6771\u4eac") in text


@pytest.mark.parametrize(
    "args", [["dead", "list"], ["dead", "list", "--format", "json"], ["dead", "replay", "--dry-run"]]
)
def test_a_reader_of_the_first_lines_ends_the_command_in_silence(command, args):
    name = command.app(MANY)
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom dramatiq_policies.__main__ import main\nmain()\n"
    with subprocess.Popen(
        [sys.executable, "-c", code, *args, name],
        cwd=command.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_a_failed_check_with_a_closed_stdout_still_exits_with_1(command):
    name = command.app("@dramatiq.actor\ndef charge(): pass\n")
    failed = run(
        command.folder,
        "check",
        name,
        before="sys.stdout.close(); import os; r, w = os.pipe(); os.close(r)\n"
        "os.dup2(w, 1); sys.stdout = open(1, 'w')\n",
    )
    assert (failed.returncode, failed.stderr) == (1, "")


def test_a_length_of_time_is_finite_and_not_negative(command):
    app = command.app(APP)
    for wrong in ("-5m", "1e999", "nan", "inf", "5 parsecs", ""):
        assert "is not a duration" in command.refuses("dead", "list", app, f"--older-than={wrong}")
    for wrong in ("nan", "inf", "0"):
        command.refuses("dead", "replay", app, "--yes", "--rate", wrong)


def test_wrong_names_are_answered_with_those_that_come_near(command):
    (command.folder / "shop").mkdir()
    (command.folder / "shop" / "__init__.py").touch()
    (command.folder / "shop" / "jobs.py").write_text("")
    assert command.refuses("check", "shpo.jobs").endswith("No module named 'shpo'; did you mean 'shop'?")
    assert command.refuses("check", "shop.job").endswith("No module named 'shop.job'; did you mean 'shop.jobs'?")
    app = command.app("class MailDown(Exception): ...\n" + PREPARED)
    assert command.refuses("explain", f"{app}:send_mail", "MailDwn").endswith("did you mean 'MailDown'?")
    assert command.refuses("explain", f"{app}:send_mail", "xyz").endswith("write it as module:Class.")


def test_a_missing_confirmation_is_one_sentence(command):
    asked = command("dead", "purge", command.app(APP), answers="")
    assert asked.stderr.splitlines()[-1] == "Error: Nothing was done: no confirmation. Answer yes, or pass --yes."


def test_numbers_are_whole_however_narrow_the_terminal_is():
    narrow = Console(width=24)
    with narrow.capture() as captured:
        narrow.print(table(["queue", "ready"], [["a_queue_with_a_long_name", 12_345_678]], right=["ready"]))
    assert "12345678" in captured.get()


# --- on a real one ----------------------------------------------------------------------------------------------------


def on_a_terminal(folder, *args, typed=b""):
    """Return the output and the exit code. ``typed`` is typed after the first output."""
    ours, theirs = pty.openpty()
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom dramatiq_policies.__main__ import main\nmain()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args],
        cwd=folder,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "60"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65_536):
            if not shown:
                os.write(ours, typed)
            shown += part
    except OSError:  # That is how a terminal says that nobody has it open any more.
        pass
    os.close(ours)
    return shown.decode(), process.wait(30)


def test_a_table_has_a_bold_head_and_is_no_wider_than_the_terminal(command):
    shown, status = on_a_terminal(command.folder, "dead", "summary", command.app(APP))
    assert status == 0
    assert "\x1b[1m" in shown
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert max(map(len, lines)) <= 60
    assert "exception   app.MailDown" in lines


def test_a_replay_shows_how_far_it_is_and_takes_that_away_again(command):
    shown, status = on_a_terminal(command.folder, "dead", "replay", command.app(MANY), "--yes")
    assert status == 0
    assert "Replaying" in shown
    assert shown.rpartition("\x1b[2K")[2].strip().endswith("dead letters replayed.")


def test_ctrl_d_among_the_questions_ends_them_with_nothing_written(command):
    shown, status = on_a_terminal(command.folder, "new", "shop/send.py", typed=b"\x04")
    assert status != 0
    assert "incomplete" not in shown
    assert not (command.folder / "shop").exists()


# --- at a Tab ---------------------------------------------------------------------------------------------------------


def completions(shell, *words):
    """Return the command's answer to Click's script for a shell."""
    line = " ".join(["dramatiq-policies", *words])
    env = {"_DRAMATIQ_POLICIES_COMPLETE": f"{shell}_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
    if shell == "fish":
        env["COMP_CWORD"] = words[-1]
    told = CliRunner().invoke(main, [], prog_name="dramatiq-policies", env=env).stdout
    return [line.rpartition(",")[2] for line in told.splitlines() if line]


def test_bash_offers_commands_options_queues_and_actors(command):
    app = command.app(APP)
    assert completions("bash", "de") == ["dead"]
    assert completions("bash", "dead", "re") == ["replay"]
    assert completions("bash", "dead", "replay", "--to") == ["--to-queue"]
    assert completions("bash", "dead", "list", app, "--queue", "") == ["import", "mail"]
    assert completions("bash", "dead", "list", app, "--actor", "s") == ["send_mail"]
    assert completions("bash", "dead", "replay", app, "--to-queue", "i") == ["import"]
    assert completions("bash", "queues", "move", app, "m") == ["mail"]
    assert completions("bash", "dead", "list", "no_such_app", "--queue", "") == []
    assert completions("bash", "dead", "list", "--queue", "") == []


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_works_in_other_shells(command, shell):
    app = command.app(APP)
    assert "mail" in completions(shell, "dead", "list", app, "--queue", "m")
    script = (
        CliRunner()
        .invoke(main, [], prog_name="dramatiq-policies", env={"_DRAMATIQ_POLICIES_COMPLETE": f"{shell}_source"})
        .stdout
    )
    assert f"_DRAMATIQ_POLICIES_COMPLETE={shell}_complete" in script


def test_the_line_of_the_docs_makes_a_real_bash_complete(command):
    app = command.app(APP)
    program = command.folder / "dramatiq-policies"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m dramatiq_policies "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (line,) = [
        part.partition("`")[0]
        for part in (ROOT / "docs" / "operating.md").read_text().split("`")
        if part.startswith('eval "$(_DRAMATIQ_POLICIES_COMPLETE=bash_source')
    ]
    asked = f"""{line}
COMP_WORDS=(dramatiq-policies dead list {app} --queue i)
COMP_CWORD=5
_dramatiq_policies_completion dramatiq-policies
echo "${{COMPREPLY[@]}}"
"""
    path = f"{command.folder}:{os.environ['PATH']}"
    answered = subprocess.run(
        ["bash", "-c", asked],
        cwd=command.folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (answered.stdout, answered.stderr) == ("import\n", "")
