"""Each delivery has one outcome, by the rules of its actor and broker."""

from __future__ import annotations

import logging
import time
from datetime import timedelta

import pytest
from dramatiq import Message
from dramatiq.middleware import (
    Middleware,
    SkipMessage,
)

from dramatiq_policies import (
    Outcome,
    OutcomeEvent,
    QueueTimeoutExceeded,
    RetryPolicy,
    TimeoutExceeded,
)
from dramatiq_policies.common import clock
from dramatiq_policies.observability.outcome_log import OutcomeLog

from ..support import Stage
from .scenarios import (
    SOON,
    CardDeclined,
    MissingKey,
    PaymentError,
    always,
    failing,
    outcomes_of,
    raw,
)


def test_a_job_that_returns_succeeded():
    stage = Stage()
    failing(stage, tags={"team": "billing"}).send()
    (event,) = stage.run().events
    assert (event.outcome, event.reason, event.actor, event.queue, event.attempt) == (
        "succeeded",
        None,
        "pay",
        "default",
        1,
    )
    assert event.exception is event.rule is event.delay_ms is None
    assert event.wait_ms >= 0
    assert event.duration_ms >= 0
    assert event.tags == {"team": "billing"}
    assert stage.dead == []


def test_an_error_of_a_retry_rule_is_retried_until_the_job_succeeds():
    stage = Stage()
    message = failing(stage, PaymentError(), CardDeclined(), retry_on={PaymentError: SOON}).send()
    assert stage.run().outcomes() == ["retried", "retried", "succeeded"]
    assert [event.attempt for event in stage.events] == [1, 2, 3]
    assert {event.message_id for event in stage.events} == {message.message_id}
    assert [event.delay_ms for event in stage.events] == [0, 0, None]
    assert stage.events[0].rule == f"{PaymentError.__module__}.PaymentError"
    assert isinstance(stage.events[1].exception, CardDeclined)


def test_attempts_count_the_first_run_and_used_up_retries_are_dead():
    stage = outcomes_of(PaymentError("no"), retry_on={PaymentError: SOON})
    assert stage.outcomes() == ["retried", "retried", "dead"]
    assert stage.reasons() == [None, None, "exhausted"]
    assert len(stage.dead) == 1


def test_a_retry_waits_as_long_as_its_rule_says():
    stage = Stage()
    waits = RetryPolicy(attempts=4, wait=lambda attempt, error: 10 * attempt)
    failing(stage, *[PaymentError()] * 3, retry_on={PaymentError: waits}).send()
    assert [event.delay_ms for event in stage.run().events] == [10, 20, 30, None]


def test_each_rule_has_its_own_counter():
    stage = Stage()
    errors = [PaymentError(), OSError(), PaymentError(), OSError()]
    failing(stage, *errors, retry_on={PaymentError: SOON, OSError: SOON}).send()
    assert stage.run().outcomes() == ["retried"] * 4 + ["succeeded"]


def test_classes_of_one_key_share_their_counter():
    stage = Stage()
    errors = [PaymentError(), OSError(), PaymentError(), OSError()]
    failing(stage, *errors, retry_on={(PaymentError, OSError): SOON}).send()
    assert stage.run().outcomes() == ["retried", "retried", "dead"]


def test_a_global_cap_ends_errors_that_alternate_without_end():
    stage = Stage(max_attempts=4)
    errors = [PaymentError(), OSError()] * 5
    failing(stage, *errors, retry_on={PaymentError: SOON, OSError: SOON}).send()
    assert stage.run().outcomes() == ["retried", "retried", "retried", "dead"]
    assert stage.reasons()[-1] == "exhausted"


def test_the_global_cap_is_never_lower_than_the_actors_highest_attempts():
    stage = Stage(max_attempts=2)
    failing(stage, *[PaymentError()] * 3, retry_on={PaymentError: RetryPolicy(attempts=4, wait=0)}).send()
    assert stage.run().outcomes() == ["retried"] * 3 + ["succeeded"]


def test_a_retry_that_would_start_after_max_elapsed_is_not_scheduled():
    stage = outcomes_of(
        PaymentError(), retry_on={PaymentError: RetryPolicy(attempts=9, wait=60_000, max_elapsed=59_999)}
    )
    assert stage.outcomes() == ["dead"]
    assert stage.reasons() == ["exhausted"]


def test_a_retry_that_would_start_just_at_max_elapsed_is_scheduled():
    stage = Stage()
    always(stage, PaymentError(), retry_on={PaymentError: RetryPolicy(wait=60_000, max_elapsed=60_000)}).send()
    with stage.working():
        stage.collected.wait_for(lambda events: events)
    assert stage.outcomes() == ["retried"]


@pytest.mark.parametrize(
    ("ago", "outcomes"), [(0, ["retried", "dead"]), (50_000, ["retried", "dead"]), (61_000, ["dead"])]
)
def test_max_elapsed_counts_from_the_rules_first_failure(ago, outcomes):
    stage = Stage()
    always(stage, PaymentError(), retry_on={PaymentError: RetryPolicy(attempts=3, wait=0, max_elapsed=60_000)})
    failed_first = int(time.time() * 1_000) - ago
    raw(
        stage,
        options={"policies": {"runs": {f"{PaymentError.__module__}.PaymentError": [1, failed_first]}, "total": 1}},
    )
    assert stage.run().outcomes() == outcomes


def test_an_error_of_a_discard_rule_is_gone():
    stage = outcomes_of(CardDeclined("no"), retry_on=PaymentError, discard_on=CardDeclined)
    assert stage.outcomes() == ["discarded"]
    assert stage.events[0].rule == f"{CardDeclined.__module__}.CardDeclined"
    assert stage.dead == []


@pytest.mark.parametrize(
    ("broker_wide", "options", "kept"),
    [
        (True, {}, True),
        (False, {"dead_letter_discards": True}, True),
        (True, {"dead_letter_discards": False}, False),
    ],
)
def test_dead_letter_discards_keeps_discarded_messages(broker_wide, options, kept):
    stage = Stage(dead_letter_discards=broker_wide)
    always(stage, CardDeclined(), discard_on=CardDeclined, **options).send()
    assert stage.run().outcomes() == ["discarded"]
    assert [failure["outcome"] for failure in stage.failures()] == (["discarded"] if kept else [])


def test_an_error_of_an_alert_rule_alerts_at_first_sight_and_is_dead_lettered(caplog):
    stage = outcomes_of(MissingKey("no key"), alert_on=MissingKey)
    assert stage.outcomes() == ["alerted"]
    (record,) = [r for r in caplog.records if r.name == "dramatiq_policies.alerts"]
    assert record.levelno == logging.CRITICAL
    assert record.exc_info[0] is MissingKey
    assert stage.failures()[0]["outcome"] == "alerted"


@pytest.mark.parametrize(("interval", "fired"), [(300_000, 1), (0, 3), (timedelta(minutes=5), 1)])
def test_repeats_of_an_alert_within_the_interval_fire_once(interval, fired, caplog):
    stage = Stage(alert_interval=interval)
    pay = always(stage, MissingKey(), alert_on=MissingKey)
    for _ in range(3):
        pay.send()
    assert stage.run().outcomes() == ["alerted"] * 3
    records = [r for r in caplog.records if r.getMessage().startswith("alerted")]
    assert sorted(r.levelno for r in records) == [logging.WARNING] * (3 - fired) + [logging.CRITICAL] * fired
    # A repeat says so, and leaves the stack to the first one.
    assert [bool(r.exc_info) for r in records] == [r.levelno == logging.CRITICAL for r in records]
    assert ["alerted again" in r.getMessage() for r in records] == [r.levelno == logging.WARNING for r in records]
    # Who has the alerts alone call somebody hears the first one only.
    assert [r.name.rpartition(".")[2] for r in records] == ["alerts"] * fired + ["outcomes"] * (3 - fired)


def test_an_alert_fires_again_as_soon_as_the_interval_is_over(monkeypatch, caplog):
    log = OutcomeLog(alert_interval=2_000)
    error = MissingKey("no key")
    fired = []
    for now in (0.0, 1.999, 2.0, 3.999):
        monkeypatch.setattr(clock, "monotonic", lambda now=now: now)
        caplog.clear()
        log.record(OutcomeEvent(outcome=Outcome.ALERTED, actor="pay", exception=error), None)
        fired.append(caplog.records[0].levelno == logging.CRITICAL)
    assert fired == [True, False, True, False]


def test_an_alert_says_which_message_of_whom_and_why(caplog):
    stage = Stage()
    message = always(stage, MissingKey("no key"), alert_on=MissingKey).send()
    stage.run()
    (record,) = [r for r in caplog.records if r.name == "dramatiq_policies.alerts"]
    assert record.getMessage() == (
        f"alerted: message {message.message_id} of actor pay, attempt 1: {MissingKey.__module__}.MissingKey: no key"
    )


def test_an_alert_of_another_actor_fires_beside_the_first(caplog):
    stage = Stage()
    for name in ("pay", "refund"):
        always(stage, MissingKey(), name=name, alert_on=MissingKey).send()
    stage.run()
    assert len([r for r in caplog.records if r.name == "dramatiq_policies.alerts"]) == 2


def test_an_alert_of_another_exception_of_the_actor_fires_as_well(caplog):
    stage = Stage()
    failing(stage, MissingKey(), CardDeclined(), alert_on=(MissingKey, CardDeclined))
    for _ in range(2):
        stage.broker.actors["pay"].send()
    stage.run()
    assert len([r for r in caplog.records if r.name == "dramatiq_policies.alerts"]) == 2


def test_alerts_of_generated_classes_do_not_accumulate():
    log = OutcomeLog(alert_interval=300_000)
    remembered = []
    for number in range(2_000):
        error = type(f"MissingKey{number}", (MissingKey,), {})()
        log.record(OutcomeEvent(outcome=Outcome.ALERTED, actor="pay", exception=error), None)
        remembered.append(len(log._alerts._last))
    assert max(remembered) == 1_000


@pytest.mark.parametrize(
    ("then", "outcome", "dead"), [("dead", "dead", 1), ("discard", "discarded", 0), ("alert", "alerted", 1)]
)
def test_the_then_of_a_policy_decides_on_a_message_whose_retries_are_used_up(then, outcome, dead):
    stage = outcomes_of(PaymentError(), retry_on={PaymentError: RetryPolicy(attempts=2, wait=0, then=then)})
    assert stage.outcomes() == ["retried", outcome]
    assert stage.reasons() == [None, "exhausted"]
    assert len(stage.dead) == dead


def test_an_error_that_nothing_names_is_retried_as_the_stock_options_say():
    stage = outcomes_of(OSError(), max_retries=2, min_backoff=1, max_backoff=2, discard_on=PaymentError)
    assert stage.outcomes() == ["retried", "retried", "dead"]
    assert stage.reasons()[-1] == "exhausted"
    assert [event.attempt for event in stage.events] == [1, 2, 3]


def test_an_error_that_no_rule_and_no_retry_names_is_dead_as_unclassified():
    stage = outcomes_of(OSError(), max_retries=0)
    assert (stage.outcomes(), stage.reasons()) == (["dead"], ["unclassified"])


def test_an_error_in_stock_throws_is_dead_as_thrown():
    for throws in (OSError, (OSError,), [OSError]):
        stage = outcomes_of(OSError(), throws=throws)
        assert (stage.outcomes(), stage.reasons()) == (["dead"], ["thrown"])


def test_an_error_that_throws_does_not_name_is_not_thrown():
    assert outcomes_of(PaymentError(), throws=OSError, max_retries=0).reasons() == ["unclassified"]
    stage = outcomes_of(PaymentError(), throws=OSError, max_retries=1, min_backoff=1, max_backoff=1)
    assert stage.reasons() == [None, "exhausted"]


def test_unclassified_replaces_the_stock_options():
    stage = Stage(unclassified=RetryPolicy(attempts=2, wait=0))
    always(stage, OSError(), max_retries=9).send()
    assert stage.run().outcomes() == ["retried", "dead"]
    assert stage.reasons()[-1] == "exhausted"


def test_unclassified_leaves_throws_and_named_errors_alone():
    stage = Stage(unclassified=RetryPolicy(attempts=2, wait=0))
    always(stage, OSError(), throws=OSError, name="thrown").send()
    always(stage, PaymentError(), discard_on=PaymentError, name="named").send()
    stage.run()
    assert stage.outcomes("thrown") == ["dead"]
    assert stage.outcomes("named") == ["discarded"]


def test_a_rule_counts_and_not_max_retries():
    stage = outcomes_of(PaymentError(), retry_on={PaymentError: SOON}, max_retries=0)
    assert stage.outcomes() == ["retried", "retried", "dead"]


def test_a_message_for_an_unknown_actor_is_dead():
    stage = Stage()
    failing(stage)
    stage.broker.enqueue(Message("default", "nobody", (), {}, {}))
    (event,) = stage.run().events
    assert (event.outcome, event.reason, event.actor) == ("dead", "unknown_actor", "nobody")
    assert stage.failures()[0]["exception"] == "dramatiq.errors.ActorNotFound"


def test_a_message_older_than_queue_timeout_before_its_first_run_is_expired():
    stage = Stage()
    failing(stage, queue_timeout=60_000)
    raw(stage)
    (event,) = stage.run().events
    assert (event.outcome, event.duration_ms) == ("expired", None)
    assert isinstance(event.exception, QueueTimeoutExceeded)
    assert stage.failures()[0]["exception"] == "dramatiq_policies.errors.QueueTimeoutExceeded"


def test_a_timedelta_in_a_messages_options_is_sent_as_milliseconds():
    stage = Stage()
    failing(stage).send_with_options(timeout=timedelta(seconds=5))
    (body,) = stage.broker.queues["default"].queue
    assert Message.decode(body).options["timeout"] == 5_000


def test_when_it_became_ready_is_not_forgotten_when_it_is_moved_out_of_the_delay_queue():
    ready = []

    class Noting(Middleware):
        def before_process_message(self, broker, message):
            ready.append(message.options["ready_at"])

    stage = Stage(middleware=[Noting()])
    failing(stage).send_with_options(delay=5)
    (body,) = stage.broker.queues["default.DQ"].queue
    time.sleep(0.05)
    stage.run()
    assert ready == [Message.decode(body).options["ready_at"]]


def test_a_test_that_joins_the_queue_learns_of_an_expired_message():
    stage = Stage()
    failing(stage, queue_timeout=60_000)
    raw(stage)
    with stage.working(), pytest.raises(QueueTimeoutExceeded):
        stage.broker.join("default", fail_fast=True, timeout=20_000)


def test_a_message_is_ready_when_its_delay_is_over(monkeypatch):
    monkeypatch.setattr(clock, "time", lambda: 1_700_000_000.0)
    stage = Stage()
    pay = failing(stage)
    pay.send()
    pay.send_with_options(delay=60_000)
    bodies = [body for name in ("default", "default.DQ") for body in stage.broker.queues[name].queue]
    assert [Message.decode(body).options["ready_at"] - 1_700_000_000_000 for body in bodies] == [0, 60_000]


def test_a_message_that_another_middleware_skips_is_skipped():
    class Skipping(Middleware):
        def before_process_message(self, broker, message):
            raise SkipMessage("not today")

    stage = Stage(middleware=[Skipping()])
    failing(stage).send()
    assert stage.run().outcomes() == ["skipped"]
    assert stage.dead == []


def test_a_message_that_another_middleware_fails_is_no_success_and_is_dead_lettered():
    class Failing(Middleware):
        def before_process_message(self, broker, message):
            message.fail()

    stage = Stage(middleware=[Failing()])
    failing(stage).send()
    assert stage.run().outcomes() == ["skipped"]
    assert len(stage.dead) == 1


@pytest.mark.parametrize(
    ("declared", "hook"),
    [
        ({"alert_on": CardDeclined}, "after_nack"),
        ({"retry_on": {CardDeclined: RetryPolicy(attempts=1)}}, "after_nack"),
        ({"discard_on": CardDeclined, "dead_letter_discards": True}, "after_nack"),
        ({"queue_timeout": 1}, "after_nack"),
        ({"discard_on": CardDeclined}, "after_ack"),
    ],
)
def test_other_middleware_see_a_nack_of_each_dead_letter_and_an_ack_of_all_else(declared, hook):
    class Noting(Middleware):
        def after_ack(self, broker, message):
            seen.append("after_ack")

        def after_nack(self, broker, message):
            seen.append("after_nack")

    seen = []
    stage = Stage(middleware=[Noting()])
    always(stage, CardDeclined(), **declared)
    raw(stage)
    stage.run()
    assert seen == [hook]


def test_a_message_that_stock_max_age_drops_is_skipped_and_dead_lettered():
    stage = Stage()
    failing(stage, max_age=1_000)
    raw(stage)
    assert stage.run().outcomes() == ["skipped"]
    assert len(stage.dead) == 1


def test_a_job_that_runs_out_of_time_is_retried_as_the_stock_options_say():
    stage = Stage()
    runs = []

    @stage.actor(timeout=50, min_backoff=1, max_backoff=2)
    def slow():
        runs.append(1)
        deadline = time.monotonic() + 10
        while len(runs) == 1 and time.monotonic() < deadline:
            time.sleep(0.001)

    slow.send()
    assert stage.run().outcomes() == ["retried", "succeeded"]
    assert isinstance(stage.events[0].exception, TimeoutExceeded)


def test_a_timeout_is_discarded_where_a_rule_names_it():
    stage = outcomes_of(TimeoutExceeded(), discard_on=TimeoutExceeded)
    assert stage.outcomes() == ["discarded"]
