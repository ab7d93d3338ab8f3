"""Texts without credentials; the loading of an application is in tests/cli/test_command.py."""

from __future__ import annotations

import pytest

from dramatiq_policies import ops


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://user:secret@db/0", "redis://***@db/0"),
        ("redis://:se/cr@et@db:6379/0 is away", "redis://***@db:6379/0 is away"),
        ("http://host:8080/users/ada@example.com", "http://host:8080/users/ada@example.com"),
        ("redis://db/0?password=secret&db=1", "redis://db/0?password=***&db=1"),
        ("Port could not be cast to integer value as 'se'", "Port could not be cast to integer value as ***"),
        ("mail to ada@example.com", "mail to ada@example.com"),
    ],
)
def test_credentials_are_masked_and_nothing_else(text, shown):
    assert ops.redact(text) == shown
