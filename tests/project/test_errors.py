"""The errors of the tree, made by hand."""

from __future__ import annotations

from dramatiq import Message

from dramatiq_policies import TimeoutExceeded
from dramatiq_policies.delivery.delivery import RUNNING, Delivery, current


def test_a_timeout_exceeded_made_with_a_text_shows_only_the_text():
    delivery = Delivery(None, Message("default", "job", (), {}, {}))
    delivery.stage, delivery.started, delivery.timeout_ms = RUNNING, 0.0, 50.0
    token = current.set(delivery)
    try:
        assert TimeoutExceeded().actor == "job"
        error = TimeoutExceeded("the gateway took too long")
    finally:
        current.reset(token)
    assert (str(error), error.actor, error.limit_ms) == ("the gateway took too long", None, None)
