"""Rules are named in words in log lines."""

from __future__ import annotations

import pytest

from dramatiq_policies import when
from dramatiq_policies.rules.parsing import parse_rules, readable_rule


class Busy(Exception):
    def is_long(self):
        return True


def is_long(error):
    return True


@pytest.mark.parametrize(
    ("declared", "names"),
    [
        (ValueError, ["ValueError"]),
        ((ValueError, Busy), ["ValueError", "Busy"]),
        ({(ValueError, Busy): 3}, ["ValueError or Busy", "ValueError or Busy"]),
        (when(Busy, is_long), ["Busy when is_long"]),
        (when(Busy, Busy.is_long), ["Busy when Busy.is_long"]),
        (when(Busy, lambda error: True), ["Busy when a lambda"]),
        ([when(Busy, lambda e: 0), when(Busy, lambda e: 1)], ["Busy when a lambda", "Busy when a lambda (no. 2)"]),
    ],
)
def test_a_rule_is_named_by_its_class_and_its_predicate(declared, names):
    for owner in ("actor", "broker"):
        rules = parse_rules("actor 'pay'", owner, retry_on=declared)
        shown = [readable_rule(rule.id) for rule in rules]
        assert [sorted(name.split(" or ")) for name in shown] == [sorted(name.split(" or ")) for name in names]


def test_a_dotted_path_is_named_by_its_class():
    (rule,) = parse_rules("ErrorClassifier", "broker", alert_on="shop.errors:NoKey")
    assert readable_rule(rule.id) == "NoKey"
