"""Each example passes `dramatiq-policies check`, as the guides recommend."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from ..forked import run_forked

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("example", ["orders.app", "flask_shop", "fastapi_shop", "fastapi_transactions", "scheduled"])
def test_an_example_passes_the_check(example):
    done = run_forked(
        ["-m", "dramatiq_policies", "check", f"examples.{example}"],
        cwd=ROOT,
        env={**os.environ, "BROKER_URL": "stub://", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Ready: " in done.stdout
