"""A job decides about its own message: Discard, Snooze, Retry."""

from __future__ import annotations

from datetime import timedelta

import pytest
from dramatiq.errors import RateLimitExceeded, Retry
from dramatiq.middleware import (
    Middleware,
)

from dramatiq_policies import (
    Discard,
    RetryPolicy,
    Snooze,
)

from ..support import Stage
from .scenarios import (
    SOON,
    PaymentError,
    always,
    failing,
    outcomes_of,
    raw,
)


def test_a_job_may_discard_its_own_message():
    stage = outcomes_of(Discard("already refunded"), retry_on=Exception)
    (event,) = stage.events
    assert event.outcome == "discarded"
    assert str(event.exception) == "already refunded"


@pytest.mark.parametrize("delay", [0, 5, timedelta(milliseconds=5)])
def test_a_job_may_snooze_without_using_up_an_attempt(delay):
    stage = Stage()
    failing(stage, *[Snooze(delay)] * 4, retry_on={PaymentError: 2}).send()
    assert stage.run().outcomes() == ["deferred"] * 4 + ["succeeded"]
    assert stage.reasons()[:4] == ["snoozed"] * 4
    assert {event.attempt for event in stage.events} == {1}
    assert stage.events[0].delay_ms == (0 if delay == 0 else 5)


def test_a_job_can_not_snooze_for_longer_than_max_snooze_in_all():
    stage = Stage(max_snooze=20)
    always(stage, Snooze(15)).send()
    stage.run()
    assert stage.outcomes()[0] == "deferred"
    assert (stage.outcomes()[-1], stage.reasons()[-1]) == ("dead", "exhausted")
    assert len(stage.dead) == 1
    assert stage.events[0].delay_ms == 15


@pytest.mark.parametrize(("most", "outcome"), [(0, "dead"), (1, "deferred")])
def test_a_job_can_not_snooze_at_all_where_max_snooze_is_nothing(most, outcome):
    stage = Stage(max_snooze=most)
    always(stage, Snooze(0)).send()
    assert stage.run().outcomes()[0] == outcome


@pytest.mark.parametrize("delay", [-1, "soon", None, float("nan")])
def test_a_snooze_that_makes_no_sense_is_an_error_in_the_job(delay):
    with pytest.raises((TypeError, ValueError), match="expected"):
        Snooze(delay)


def test_no_snooze_is_longer_than_dramatiq_can_delay():
    stage = Stage()
    failing(stage, Snooze(10**400)).send()
    with stage.working():
        stage.collected.wait_for(lambda events: events)
    assert stage.events[0].delay_ms == 7 * 86_400_000


@pytest.mark.parametrize(
    ("error", "declared", "delay"),
    [
        (PaymentError(), {"retry_on": {PaymentError: RetryPolicy(wait=5)}}, 5),
        (PaymentError(), {"retry_on": {PaymentError: RetryPolicy(wait=0)}}, 0),
        (Retry(delay=5), {}, 5),
        (Retry(delay=0), {}, 0),
        (Retry(delay=-5), {}, 0),
        (Snooze(5), {}, 5),
        (Snooze(0), {}, 0),
    ],
)
def test_a_requeued_message_waits_for_the_delay_of_its_record_or_is_ready_at_once(error, declared, delay):
    stage = Stage()
    actor = failing(stage, error, **declared)
    enqueue, delays = stage.broker.enqueue, []

    def noted(message, *, delay=None):
        delays.append(delay)
        return enqueue(message, delay=delay)

    stage.broker.enqueue = noted
    actor.send()
    stage.run()
    # The last is the move out of the delay queue.
    assert delays == ([None, delay, None] if delay else [None, None])
    assert stage.events[0].delay_ms == delay


def test_a_message_counts_how_often_it_has_snoozed():
    carried = []

    class Noting(Middleware):
        def before_process_message(self, broker, message):
            carried.append(message.options.get("policies", {}).get("snoozes"))

    stage = Stage(middleware=[Noting()])
    failing(stage, Snooze(0), Snooze(0)).send()
    stage.run()
    assert carried == [None, 1, 2]


def test_a_message_that_ran_has_no_deferrals_any_more():
    carried = []

    class Noting(Middleware):
        def before_process_message(self, broker, message):
            carried.append(message.options["policies"].get("deferrals"))

    stage = Stage(middleware=[Noting()])
    failing(stage, PaymentError(), retry_on={PaymentError: SOON})
    raw(stage, options={"policies": {"deferrals": 3}})
    stage.run()
    assert carried == [3, None]


def test_retry_with_a_delay_is_honoured():
    stage = Stage()
    failing(stage, Retry(delay=7)).send()
    assert stage.run().outcomes() == ["retried", "succeeded"]
    assert stage.events[0].delay_ms == 7


def test_retry_with_a_delay_is_honoured_where_a_rule_names_it():
    stage = Stage()
    failing(stage, Retry(delay=7), Retry(), retry_on={Exception: RetryPolicy(wait=3)}).send()
    assert stage.run().outcomes() == ["retried", "retried", "succeeded"]
    assert [event.delay_ms for event in stage.events] == [7, 3, None]


def test_retry_is_no_error_that_a_rule_for_any_could_discard():
    stage = Stage()
    failing(stage, Retry(delay=1), discard_on=Exception).send()
    assert stage.run().outcomes() == ["retried", "succeeded"]


def test_a_rate_limit_without_a_rule_is_as_stock_has_it():
    stage = Stage(unclassified=RetryPolicy(attempts=1))
    failing(stage, RateLimitExceeded("later"), min_backoff=1, max_backoff=2).send()
    assert stage.run().outcomes() == ["retried", "succeeded"]
