"""The bounds of Dramatiq's own waits; the command is in tests/cli/test_explain.py."""

from __future__ import annotations

import pytest
from dramatiq.common import compute_backoff

from dramatiq_policies.ops.explanations.explanation import stock_bounds


@pytest.mark.parametrize("retries", [0, 1, 3, 6, 40])
def test_dramatiq_s_own_waits_are_within_the_bounds(retries):
    least, most = stock_bounds(retries, 1_000, 10_000)
    found = [compute_backoff(retries, factor=1_000, max_backoff=10_000)[1] for _ in range(2_000)]
    assert least <= min(found)
    assert max(found) <= most
    assert min(found) - least < 0.1 * most
    assert most - max(found) < 0.1 * most
