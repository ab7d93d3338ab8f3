"""Print the coverage from the file of `coverage json`, and fail below 95 % of the branches alone.

`coverage report --fail-under` counts statements and branches together, and the sum is nearly always higher.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

WANTED = 0.95


def main(path: str) -> str | None:
    """Return the complaint; None if enough is covered."""
    totals = json.loads(Path(path).read_text())["totals"]
    for what, covered, of in (
        ("statements", totals["covered_lines"], totals["num_statements"]),
        ("branches", totals["covered_branches"], totals["num_branches"]),
    ):
        print(f"{what}: {covered:,} of {of:,}, {covered / of:.2%}")
    if totals["covered_branches"] < WANTED * totals["num_branches"]:
        return f"Less than {WANTED:.0%} of the branches are covered."
    return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
