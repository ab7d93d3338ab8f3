"""scripts/branch_coverage.py, the last step of `make coverage`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "branch_coverage.py"


@pytest.mark.parametrize(
    ("branches", "status", "complaint"),
    [(1_900, 0, ""), (1_899, 1, "Less than 95% of the branches are covered.\n")],
    ids=["as many as are wanted", "one branch short"],
)
def test_the_required_share_of_branches_does_not_depend_on_statements(tmp_path, branches, status, complaint):
    totals = {"covered_lines": 9_900, "num_statements": 10_000, "covered_branches": branches, "num_branches": 2_000}
    (tmp_path / "coverage.json").write_text(json.dumps({"totals": totals}))
    run = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "coverage.json"], check=False, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (status, complaint)
    assert run.stdout == (
        f"statements: 9,900 of 10,000, 99.00%\nbranches: {branches:,} of 2,000, {branches / 2_000:.2%}\n"
    )
