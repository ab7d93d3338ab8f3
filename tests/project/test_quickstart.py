"""The output of `make demo`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_demo_shows_every_ending_and_why_the_dead_letters_died():
    ran = subprocess.run(
        [sys.executable, str(ROOT / "examples/quickstart.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    for end in (
        "succeeded",
        "dead        exhausted",
        "discarded",
        "alerted",
        "duplicate   completed",
    ):
        assert f"  {end}" in ran.stdout
    # Jitter makes the wait of 300 ms longer by at most 15 %.
    assert re.search(r"attempt 1  retried     again in 3[0-4]\d ms, RateLimited", ran.stdout)
    assert "dead, exhausted after 5 x: builtins.KeyError: 'KB-11'" in ran.stdout
    assert "dead, exhausted after 3 x: __main__.MailTimeout: no answer within 5 s" in ran.stdout
    assert "\033" not in ran.stdout
