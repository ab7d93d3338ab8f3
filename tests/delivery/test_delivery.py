"""The state of a message on its way; test_consumer.py and test_settlement.py have its end."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from dramatiq import Message

from dramatiq_policies import Outcome
from dramatiq_policies.common import clock
from dramatiq_policies.delivery.decision import Decision
from dramatiq_policies.delivery.delivery import Delivery


def delivery(**options):
    return Delivery(None, Message("default", "job", (), {}, options))


@pytest.mark.parametrize(
    ("options", "started", "waited"),
    [
        ({"ready_at": 990_000}, 58.0, 8_000.0),
        # Another machine's clock may be ahead.
        ({"ready_at": 999_000}, 58.0, 0.0),
        ({}, 58.0, None),
        ({"ready_at": 990_000}, None, None),
    ],
)
def test_a_message_waits_from_when_it_is_ready_until_its_job_starts(monkeypatch, options, started, waited):
    monkeypatch.setattr(clock, "time", lambda: 1_000.0)
    monkeypatch.setattr("dramatiq_policies.delivery.delivery.monotonic", lambda: 60.0)
    one = delivery(**options)
    one.started = started
    assert one.waited_ms() == waited


@pytest.mark.parametrize(
    ("claim", "outcome", "remembered"),
    [
        (SimpleNamespace(keyed=True), Outcome.SUCCEEDED, True),
        (SimpleNamespace(keyed=True), Outcome.DUPLICATE, True),
        (SimpleNamespace(keyed=True), Outcome.DEAD, False),
        (SimpleNamespace(keyed=True), None, False),
        (SimpleNamespace(keyed=False), Outcome.SUCCEEDED, False),
        (None, Outcome.SUCCEEDED, False),
    ],
)
def test_a_completion_is_remembered_under_a_key_of_its_own(claim, outcome, remembered):
    one = delivery()
    one.claim = claim
    one.decision = None if outcome is None else Decision(outcome)
    assert one.completes_key() is remembered
