"""docs/test-driven-jobs.md, followed step by step: its tests fail, then nearly pass, then pass."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dramatiq_policies

PAGE = (Path(__file__).parents[2] / "docs" / "test-driven-jobs.md").read_text()
BLOCK = re.compile(r"^```python\n# (\S+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def follow(tmp_path):
    """Write the page's blocks, in order and up to one, and run its tests as a reader does."""
    blocks = list(BLOCK.finditer(PAGE))
    assert len(blocks) == PAGE.count("```python") == 4

    def run(number):
        for block in blocks[:number]:
            file, text = tmp_path / block[1], block[2]
            if text.startswith("def "):  # in the place of the function, below its decorator
                text = file.read_text().partition("\ndef ")[0] + "\n" + text
            file.write_text(text)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull),
                *("-p", "dramatiq_policies.testing.pytest_plugin", "-p", "no:dramatiq_policies", str(tmp_path)),
            ],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(Path(dramatiq_policies.__file__).parents[1]), str(tmp_path)]),
                "PYTHONDONTWRITEBYTECODE": "1",
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.stdout

    return run


def test_the_guide_s_tests_fail_before_there_is_a_job(follow):
    out = follow(2)
    assert "No module named 'confirmation'" in out
    assert "passed" not in out


def test_a_job_with_a_fresh_key_in_each_run_is_found_out_by_the_crash_at_each_line(follow):
    out = follow(3)
    assert "1 failed, 9 passed" in out
    assert "FAILED test_confirmation.py::test_a_worker_may_die_at_any_line" in out
    (shown,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    plain = re.sub(r"^E +", "  ", out, flags=re.MULTILINE)
    for line in shown.splitlines():
        assert line.strip() in plain


def test_the_guide_s_tests_pass_once_the_job_is_written(follow):
    assert "10 passed" in follow(4)
