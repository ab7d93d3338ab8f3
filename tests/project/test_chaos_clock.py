"""The wrong clock of the chaos tests."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.chaos.run import WRONG_CLOCK


def test_a_process_with_a_wrong_clock_sleeps_rightly_and_stamps_messages_wrongly(tmp_path: Path) -> None:
    clock = tmp_path / "clock"
    clock.write_text("+3600.000")
    code = (
        "import time; from dramatiq.common import current_millis; "
        "began = time.monotonic(); time.sleep(0.01); assert time.monotonic() - began >= 0.01; "
        "print(current_millis(), time.time_ns() // 1_000_000)"
    )
    environment = {**os.environ, "PYTHONPATH": str(WRONG_CLOCK), "CHAOS_CLOCK": str(clock)}
    before = time.time() * 1_000
    said = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    after = time.time() * 1_000
    for stamp in map(int, said.stdout.split()):
        assert before - 1 <= stamp - 3_600_000 <= after + 1
