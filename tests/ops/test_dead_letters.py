"""The filter of dead letters; the commands are in tests/cli/test_dead.py."""

from __future__ import annotations

import pytest
from dramatiq import Message

from dramatiq_policies import ops
from dramatiq_policies.ops import DeadLetter


@pytest.mark.parametrize(
    ("value", "text", "held"),
    [
        (7, "7", True),
        ("7", "7", True),
        ("7", '"7"', True),
        (7, '"7"', False),
        (True, "true", True),
        (None, "null", True),
        (1, "true", False),
        ([1, 2], "[1,2]", True),
        ("ada", "bob", False),
    ],
)
def test_an_argument_is_compared_as_text_or_as_json(value, text, held):
    dead_letter = DeadLetter(
        queue="mail",
        message_id="m",
        actor="send",
        outcome="dead",
        reason=None,
        exception=None,
        text=None,
        traceback=None,
        attempts=1,
        failed_at=None,
        message=Message("mail", "send", (value,), {"order": {"id": value}}, {}),
    )
    assert ops.Filter(arguments={"first": text}, parameters={"send": ("first",)})(dead_letter) is held
    assert ops.Filter(arguments={"order.id": text})(dead_letter) is held
    assert not ops.Filter(arguments={"missing": text})(dead_letter)
