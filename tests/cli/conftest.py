"""The command as a user runs it, in this process for speed, on applications written for each test."""

from __future__ import annotations

import importlib
import json
import sys
import textwrap
import uuid

import dramatiq.broker
import pytest
from click.testing import CliRunner

from dramatiq_policies.cli import main

PREAMBLE = """\
from __future__ import annotations
import dramatiq
from dramatiq.brokers.stub import StubBroker
from dramatiq_policies import *
from dramatiq_policies import ErrorClassifier, RetryPolicy, Timeout, constant, exponential, install, when
"""
STUB = """\
broker = StubBroker()
install(broker)
dramatiq.set_broker(broker)
"""


class Command:
    """Applications in a folder of their own, and the command run in it."""

    def __init__(self, folder):
        self.folder = folder

    def app(self, source, *, broker=STUB):
        """Write a module and return its name."""
        name = f"app_{uuid.uuid4().hex[:8]}"
        (self.folder / f"{name}.py").write_text(PREAMBLE + broker + textwrap.dedent(source))
        return name

    def __call__(self, *args, answers=None, env=None):
        # A test may write a module in the same tick of the file system's clock as the last import.
        importlib.invalidate_caches()
        return CliRunner().invoke(main, [str(arg) for arg in args], input=answers, env=env)

    def json(self, *args, code=0):
        result = self(*args, "--format", "json")
        assert result.exit_code == code, result.output
        return json.loads(result.stdout)

    def refuses(self, *args, **kwargs):
        """The one sentence with which it ends."""
        result = self(*args, **kwargs)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        return line


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(dramatiq.broker, "global_broker", None)
    before = set(sys.modules)
    yield Command(tmp_path)
    for name in set(sys.modules) - before:
        if name.startswith("app_"):
            del sys.modules[name]
