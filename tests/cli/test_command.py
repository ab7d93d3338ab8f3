"""The command as a process: its name, its exit codes, and what it says without its extra."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dramatiq_policies import ops
from dramatiq_policies.cli import main
from dramatiq_policies.common.durations import format_duration

from ..forked import run_forked
from .test_check import PREPARED

ROOT = Path(__file__).parents[2]


def run(folder, *args, before=""):
    """Run the command as a process. Code ``before`` the first import of the package needs a new process."""
    if not before:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return run_forked(["-m", "dramatiq_policies", *args], cwd=folder, env=env)
    code = (
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{before}from dramatiq_policies.__main__ import main\nmain()\n"
    )
    return subprocess.run([sys.executable, "-c", code, *args], cwd=folder, capture_output=True, text=True, check=False)


def test_the_entry_point_is_the_module_s_main():
    assert 'dramatiq-policies = "dramatiq_policies.__main__:main"' in (ROOT / "pyproject.toml").read_text()


def test_the_command_exits_with_0_1_and_2(command):
    ready, bare = command.app(PREPARED), command.app("@dramatiq.actor\ndef charge(): pass\n")
    assert run(command.folder, "check", ready).returncode == 0
    assert run(command.folder, "check", bare).returncode == 1
    failed = run(command.folder, "check", "nothing")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == "Error: 'nothing' can't be imported: ModuleNotFoundError: No module named 'nothing'\n"


def test_a_group_without_a_command_says_which_there_are(command):
    failed = run(command.folder, "keys")
    assert (failed.returncode, failed.stderr) == (2, "Error: Missing command: forget, show.\n")


def _commands(group, words=()):
    for name, command in group.commands.items():
        yield (*words, name), command
        if isinstance(command, click.Group):
            yield from _commands(command, (*words, name))


def test_each_help_has_an_example_and_fits_80_columns():
    for words, _ in _commands(main):
        shown = CliRunner().invoke(main, [*words, "--help"], terminal_width=80).output
        assert "Example:\n  " in shown, words
        assert [line for line in shown.splitlines() if len(line) > 80] == [], words


def test_each_option_has_a_help_text():
    for words, command in _commands(main):
        options = [one for one in command.params if isinstance(one, click.Option)]
        assert [one.name for one in options if not one.help] == [], words


def test_the_command_without_its_extra_says_what_to_install(command):
    for missing in ("click", "rich"):
        failed = run(command.folder, "check", "app", before=f"sys.modules[{missing!r}] = None\n")
        assert (failed.returncode, failed.stdout) == (2, "")
        assert failed.stderr == f'Error: the command needs {missing}: pip install "dramatiq-policies[cli]"\n'


def test_any_other_module_that_is_missing_is_no_missing_extra(command):
    module = "dramatiq_policies.cli.dead"
    failed = run(command.folder, "check", "app", before=f"import dramatiq_policies\nsys.modules[{module!r}] = None\n")
    assert failed.stderr.splitlines()[-1].startswith(f"ModuleNotFoundError: import of {module}")


def test_output_into_a_pipe_has_no_colour_and_breaks_no_line(command):
    shown = run(command.folder, "check", command.app("@dramatiq.actor\ndef charge(): pass\n")).stdout
    assert "\x1b" not in shown
    assert any(len(line) > 100 for line in shown.splitlines())


def test_the_example_passes_check(monkeypatch):
    monkeypatch.setenv("BROKER_URL", "stub://")
    checked = run(ROOT, "check", "examples.orders.app", "--strict", "--require-tag", "team")
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("ms", "said"),
    [
        (None, "-"),
        (850, "850 ms"),
        (1_500, "1.5 s"),
        (59_600, "59.6 s"),
        (125_000, "2 m 5 s"),
        (12_000_000, "3 h 20 m"),
        (86_400_000, "24 h"),
        (7 * 86_400_000, "7 d"),
    ],
)
def test_a_length_of_time_is_written_as_a_person_would(ms, said):
    assert format_duration(ms) == said


def test_a_closed_pipe_ends_the_command_without_a_message(command):
    bare = command.app("@dramatiq.actor\ndef charge(): pass\n")
    code = (
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom dramatiq_policies.__main__ import main\ninput()\nmain()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "check", bare],
        cwd=command.folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(30), said) == (1, b"")


def test_ctrl_c_is_one_word(command, monkeypatch):
    monkeypatch.setattr(ops, "load_broker", interrupted)
    result = command("queues", command.app(PREPARED))
    assert (result.exit_code, result.stdout, result.stderr.strip()) == (130, "", "Interrupted.")


def test_ctrl_c_while_it_is_being_imported_is_one_word_too(command):
    early = (
        "class Slow:\n"
        "    def find_spec(name, *args):\n"
        "        if name == 'click': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Slow)\n"
    )
    for before, app in ((early, PREPARED), ("", "raise KeyboardInterrupt\n")):
        ended = run(command.folder, "check", command.app(app), before=before)
        assert (ended.returncode, ended.stdout, ended.stderr.strip()) == (130, "", "Interrupted.")


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def test_an_unexpected_error_is_one_line(command, monkeypatch):
    monkeypatch.setattr(ops, "load_broker", broken)
    assert command.refuses("queues", command.app(PREPARED)) == "Error: ZeroDivisionError: by nothing"


def broken(*args, **kwargs):
    raise ZeroDivisionError("by\nnothing")


@pytest.mark.parametrize("given", ["./shop.py", "shop.py"])
def test_a_file_in_place_of_a_module_gets_the_module_s_name(command, given):
    assert command.refuses("check", given) == f"Error: {given!r} is a file; name the module, 'shop'."


@pytest.mark.parametrize("given", ["", "."])
def test_a_folder_in_place_of_a_new_module_is_one_sentence(command, given):
    assert "is not a module; name a file below this folder" in command.refuses("new", given)
