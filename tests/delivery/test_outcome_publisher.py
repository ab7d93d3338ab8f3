"""Who is called with an outcome, and in which order."""

from __future__ import annotations

import pytest

from dramatiq_policies import Outcome, OutcomeEvent
from dramatiq_policies.delivery.outcome_publisher import OutcomePublisher

SUCCEEDED = OutcomeEvent(outcome=Outcome.SUCCEEDED)
DEAD = OutcomeEvent(outcome=Outcome.DEAD)


def test_an_observer_without_successes_is_called_for_the_other_outcomes_only() -> None:
    outcomes, seen = OutcomePublisher(), []
    outcomes.observe("one", lambda event, message: seen.append(("one", event.outcome, message)), successes=False)
    assert not outcomes.successes_observed
    outcomes.observe("two", lambda event, message: seen.append(("two", event.outcome, message)))
    assert outcomes.successes_observed
    outcomes.publish(SUCCEEDED, None)
    assert seen == [("two", Outcome.SUCCEEDED, None)]
    outcomes.publish(DEAD, None)
    assert seen[1:] == [("one", Outcome.DEAD, None), ("two", Outcome.DEAD, None)]


def test_without_observers_no_success_is_observed_and_nothing_happens() -> None:
    outcomes = OutcomePublisher()
    assert not outcomes.successes_observed
    outcomes.publish(SUCCEEDED, None)
    outcomes.publish(DEAD, None)


def test_observers_are_called_in_their_order_except_for_one_that_asks_to_be_first() -> None:
    outcomes, seen = OutcomePublisher(), []
    for name, first in (("one", False), ("two", False), ("zero", True)):
        outcomes.observe(name, lambda event, message, name=name: seen.append(name), first=first)
    outcomes.publish(DEAD, None)
    assert seen == ["zero", "one", "two"]


def test_the_observers_of_a_replaced_middleware_are_forgotten() -> None:
    outcomes, seen = OutcomePublisher(), []
    replaced, other = object(), object()
    outcomes.subscribe(replaced, seen.append)
    outcomes.observe(other, lambda event, message: seen.append(message), successes=False)
    outcomes.forget(replaced)
    assert not outcomes.successes_observed
    outcomes.publish(DEAD, None)
    assert seen == [None]


@pytest.mark.parametrize("error", [ValueError("a bug"), SystemExit(3)])
def test_an_error_of_an_observer_is_logged_by_its_name_and_the_next_one_is_called(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes, seen = OutcomePublisher(), []

    def fails(event: OutcomeEvent) -> None:
        raise error

    outcomes.subscribe("owner", fails)
    outcomes.subscribe("owner", seen.append)
    outcomes.publish(SUCCEEDED, None)
    assert seen == [SUCCEEDED]
    (record,) = caplog.records
    assert repr(fails) in record.getMessage()
    assert record.exc_info is not None


def test_an_observer_without_a_name_is_logged_itself(caplog: pytest.LogCaptureFixture) -> None:
    outcomes = OutcomePublisher()

    def fails(event: OutcomeEvent, message: object) -> None:
        raise ValueError

    outcomes.observe("owner", fails)
    outcomes.publish(DEAD, None)
    assert repr(fails) in caplog.text
