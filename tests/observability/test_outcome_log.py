"""The log lines of outcomes other than permanent failures."""

from __future__ import annotations

import pytest

from dramatiq_policies import Outcome, OutcomeEvent, Snooze
from dramatiq_policies.observability.outcome_log import OutcomeLog, by_rule


def line_of(event: OutcomeEvent, caplog: pytest.LogCaptureFixture) -> str:
    with caplog.at_level("INFO", logger="dramatiq_policies.outcomes"):
        OutcomeLog(alert_interval=0).record(event, None)
    (record,) = caplog.records
    return record.getMessage()


def deferred(error: BaseException, delay_ms: int = 500) -> OutcomeEvent:
    return OutcomeEvent(
        outcome=Outcome.DEFERRED, reason="snoozed", actor="pay", message_id="m1", delay_ms=delay_ms, exception=error
    )


def test_a_wait_is_a_duration_for_people_and_a_number_for_machines(caplog: pytest.LogCaptureFixture) -> None:
    assert line_of(deferred(Snooze(600_000), 600_000), caplog).endswith("(snoozed), again in 10 m")
    assert vars(caplog.records[-1])["delay_ms"] == 600_000


def test_a_snooze_without_a_reason_has_none_in_its_line(caplog: pytest.LogCaptureFixture) -> None:
    assert line_of(deferred(Snooze(500)), caplog) == "deferred: message m1 of actor pay (snoozed), again in 500 ms"


def test_the_reason_of_a_snooze_ends_its_line(caplog: pytest.LogCaptureFixture) -> None:
    line = line_of(deferred(Snooze(500, "the bank is closed")), caplog)
    assert line.startswith("deferred: message m1 of actor pay (snoozed), again in 500 ms: ")
    assert line.endswith("the bank is closed")


@pytest.mark.parametrize(
    ("rule", "part"), [(None, ""), ("unclassified", ", unclassified"), ("actor:KeyError", ", by the rule for ")]
)
def test_a_line_names_the_rule_if_one_decided(rule: str | None, part: str) -> None:
    named = by_rule(OutcomeEvent(outcome=Outcome.RETRIED, rule=rule))
    assert named.startswith(part)
    assert bool(named) is bool(rule)


def test_a_permanent_failure_is_left_to_others(caplog: pytest.LogCaptureFixture) -> None:
    OutcomeLog(alert_interval=0).record(OutcomeEvent(outcome=Outcome.DEAD, exception=ValueError()), None)
    assert caplog.records == []
