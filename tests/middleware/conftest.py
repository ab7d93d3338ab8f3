"""Fixtures of the tests of middleware."""

from __future__ import annotations

import pytest

from dramatiq_policies.delivery import publishing


@pytest.fixture
def impatient(monkeypatch):
    """The worker gives up on a broker that refuses messages at once, not after a while."""
    monkeypatch.setattr(publishing, "_RETRY_REFUSAL_FOR", 0.05)
    monkeypatch.setattr(publishing, "_RETRY_PAUSES", (0.0, 0.01))
