"""Interrupts under gevent: the scenarios of `greenlet_scenarios.py`, all run by one process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCENARIOS = re.findall(r"@scenario\ndef (\w+)", (Path(__file__).parent / "greenlet_scenarios.py").read_text())


@pytest.fixture(scope="module")
def failures():
    pytest.importorskip("gevent")
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "gevent.monkey", "--module", "tests.interrupts.greenlet_scenarios"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_scenario_holds_under_gevent(scenario, failures):
    assert scenario not in failures, failures[scenario]
