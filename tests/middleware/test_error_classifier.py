from __future__ import annotations

import contextvars
import itertools
import json
import logging
import math
import re
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import dramatiq
import pytest
from dramatiq import Message, group, pipeline
from dramatiq.broker import MessageProxy
from dramatiq.brokers.stub import StubBroker
from dramatiq.errors import ConnectionClosed, RateLimitExceeded, Retry
from dramatiq.middleware import (
    AsyncIO,
    GroupCallbacks,
    Middleware,
    MiddlewareError,
    Retries,
    Shutdown,
    ShutdownNotifications,
    SkipMessage,
)
from dramatiq.rate_limits.backends import StubBackend as RateLimiterStubBackend
from dramatiq.results import ResultFailure, Results
from dramatiq.results.backends import StubBackend

from dramatiq_policies import (
    ConfigurationError,
    Discard,
    DiscardLogger,
    ErrorClassifier,
    HandoffFailed,
    Heartbeat,
    Idempotency,
    NoCurrentJob,
    Outcome,
    OutcomeEvent,
    QueueTimeoutExceeded,
    RetryPolicy,
    Snooze,
    Timeout,
    TimeoutExceeded,
    current_job,
    exponential,
    install,
    when,
)
from dramatiq_policies.common import clock
from dramatiq_policies.delivery import publishing
from dramatiq_policies.delivery.broker_state import state_of

from ..support import Stage


class PaymentError(Exception):
    pass


class CardDeclined(PaymentError):
    pass


class MissingKey(Exception):
    pass


SOON = RetryPolicy(attempts=3, wait=0)


def failing(stage, *errors, name="pay", result=None, **options):
    """An actor that raises one after another, then returns the result."""
    left = list(errors)

    @stage.actor(actor_name=name, **options)
    def pay(*args, **kwargs):
        if left:
            raise left.pop(0)
        return result

    return pay


def always(stage, error, name="pay", **options):
    @stage.actor(actor_name=name, **options)
    def pay(*args, **kwargs):
        raise error

    return pay


def outcomes_of(error, **options):
    stage = Stage()
    always(stage, error, **options).send()
    return stage.run()


# One outcome for each delivery.


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
    assert stage.events[0].rule == f"{__name__}.PaymentError"
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
    raw(stage, options={"policies": {"runs": {f"{__name__}.PaymentError": [1, failed_first]}, "total": 1}})
    assert stage.run().outcomes() == outcomes


def test_an_error_of_a_discard_rule_is_gone():
    stage = outcomes_of(CardDeclined("no"), retry_on=PaymentError, discard_on=CardDeclined)
    assert stage.outcomes() == ["discarded"]
    assert stage.events[0].rule == f"{__name__}.CardDeclined"
    assert stage.dead == []


@pytest.mark.parametrize(
    ("broker_wide", "options", "kept"),
    [
        (True, {}, True),
        (False, {"dead_letter_discards": True}, True),
        (True, {"dead_letter_discards": False}, False),
    ],
)
def test_dead_letter_discards_keeps_what_is_discarded(broker_wide, options, kept):
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
    alert = Stage(alert_interval=2_000).classifier._alert
    error = MissingKey("no key")
    fired = []
    for now in (0.0, 1.999, 2.0, 3.999):
        monkeypatch.setattr(clock, "monotonic", lambda now=now: now)
        caplog.clear()
        alert(OutcomeEvent(outcome=Outcome.ALERTED, actor="pay", exception=error), error, None)
        fired.append(caplog.records[0].levelno == logging.CRITICAL)
    assert fired == [True, False, True, False]


def test_an_alert_says_which_message_of_whom_and_why(caplog):
    stage = Stage()
    message = always(stage, MissingKey("no key"), alert_on=MissingKey).send()
    stage.run()
    (record,) = [r for r in caplog.records if r.name == "dramatiq_policies.alerts"]
    assert record.getMessage() == (
        f"alerted: message {message.message_id} of actor pay, attempt 1: {__name__}.MissingKey: no key"
    )


def test_an_alert_of_another_actor_fires_whatever_the_first_has_said(caplog):
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


def test_alerts_of_classes_made_on_the_fly_do_not_pile_up():
    classifier = Stage().classifier
    remembered = []
    for number in range(2_000):
        error = type(f"MissingKey{number}", (MissingKey,), {})()
        classifier._alert(OutcomeEvent(outcome=Outcome.ALERTED, actor="pay", exception=error), error, None)
        remembered.append(len(classifier._alerts._last))
    assert max(remembered) == 1_000


@pytest.mark.parametrize(
    ("then", "outcome", "dead"), [("dead", "dead", 1), ("discard", "discarded", 0), ("alert", "alerted", 1)]
)
def test_then_says_what_becomes_of_a_message_whose_retries_are_used_up(then, outcome, dead):
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


def raw(stage, actor="pay", queue="default", **changes):
    """Put a body on the queue as somebody else would."""
    body = {
        "queue_name": queue,
        "actor_name": actor,
        "args": [],
        "kwargs": {},
        "options": {},
        "message_id": "by-hand",
        "message_timestamp": 1_700_000_000_000,
        **changes,
    }
    stage.broker.queues["default"].put(json.dumps(body).encode())


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


def test_a_test_that_joins_the_queue_is_told_of_an_expired_message():
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
def test_other_middleware_see_a_nack_of_what_is_dead_lettered_and_an_ack_of_all_else(declared, hook):
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


# Verbs in the job.


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
def test_what_is_put_back_waits_for_as_long_as_its_record_says_and_without_a_wait_is_ready_at_once(
    error, declared, delay
):
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


# Whose rules.


@pytest.mark.parametrize("named", [CardDeclined, f"{__name__}.CardDeclined", f"{__name__}:CardDeclined"])
def test_a_brokers_rule_holds_for_every_actor_also_as_a_dotted_string(named):
    stage = Stage(discard_on=named)
    always(stage, CardDeclined()).send()
    assert stage.run().outcomes() == ["discarded"]


def test_a_brokers_rule_for_the_nearer_class_beats_the_actors_for_a_wider_one():
    stage = Stage(discard_on=CardDeclined)
    always(stage, CardDeclined(), retry_on=PaymentError).send()
    assert stage.run().outcomes() == ["discarded"]


def test_an_actor_without_broker_rules_has_only_its_own():
    stage = Stage(discard_on=CardDeclined)
    always(stage, CardDeclined(), retry_on={PaymentError: SOON}, broker_rules=False).send()
    assert stage.run().outcomes() == ["retried", "retried", "dead"]


def test_when_narrows_a_class():
    stage = Stage()
    pay = stage.actor(
        lambda code: (_ for _ in ()).throw(OSError(code, "x")),
        actor_name="pay",
        discard_on=when(OSError, lambda error: error.errno == 28),
        alert_on=OSError,
    )
    pay.send(28)
    pay.send(5)
    assert sorted(stage.run().outcomes()) == ["alerted", "discarded"]


def test_a_dotted_path_that_leads_nowhere_keeps_a_worker_from_booting():
    stage = Stage(discard_on="no.such.Error")
    failing(stage)
    with pytest.raises(ConfigurationError, match=r"no\.such\.Error"):
        stage.run()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups are new in 3.11")
def test_a_group_goes_by_its_leaves():
    def grouped(*errors):
        return ExceptionGroup("several", errors)  # noqa: F821

    stage = Stage()
    options = {"retry_on": {PaymentError: SOON, OSError: 2}, "discard_on": CardDeclined, "alert_on": MissingKey}
    always(stage, grouped(PaymentError(), CardDeclined(), MissingKey()), name="alerts", **options).send()
    always(stage, grouped(PaymentError(), CardDeclined()), name="discards", **options).send()
    fewest = RetryPolicy(attempts=2, wait=0)
    always(
        stage, grouped(PaymentError(), OSError()), name="retries", retry_on={PaymentError: SOON, OSError: fewest}
    ).send()
    stage.run()
    assert stage.outcomes("alerts") == ["alerted"]
    assert stage.outcomes("discards") == ["discarded"]
    assert stage.outcomes("retries") == ["retried", "dead"]


# Bad declarations.


async def later(*args):
    return True


def made_one_by_one(*args):
    yield True


@pytest.mark.parametrize(
    ("option", "value", "got"),
    [
        ("retry_on", "PaymentError", "'PaymentError'"),
        ("retry_on", PaymentError(), "PaymentError()"),
        ("retry_on", {PaymentError: 0}, "0"),
        ("retry_on", {PaymentError: "5"}, "'5'"),
        ("retry_on", int, "<class 'int'>"),
        ("discard_on", {PaymentError: 5}, f"{{{PaymentError!r}: 5}}"),
        ("discard_on", 404, "404"),
        ("alert_on", [PaymentError, None], "None"),
        ("alert_on", when(int, bool), "<class 'int'>"),
        ("broker_rules", "no", "'no'"),
        ("after_discard", "notify", "'notify'"),
        ("after_discard", later, repr(later)),
        ("retry_when", later, repr(later)),
        ("dead_letter_discards", 1, "1"),
        ("tags", {"team": 5}, "{'team': 5}"),
        ("tags", ["billing"], "['billing']"),
        ("throws", "ValueError", "'ValueError'"),
        ("throws", [ValueError, 5], "[<class 'ValueError'>, 5]"),
        ("timeout", -1, "-1"),
        ("timeout", "30s", "'30s'"),
        ("queue_timeout", 0, "0"),
        ("retry_on", {(): 3}, "()"),
        ("discard_on", when((), bool), f"When(exceptions=(), predicate={bool!r})"),
        ("after_discard", lambda: None, None),
        ("after_discard", made_one_by_one, repr(made_one_by_one)),
        ("retry_when", lambda retries: True, None),
        ("done_when", made_one_by_one, repr(made_one_by_one)),
        ("max_retries", "3", "'3'"),
        ("max_retries", True, "True"),
        ("max_retries", math.nan, "nan"),
        ("min_backoff", None, "None"),
        ("min_backoff", -1, "-1"),
        ("max_backoff", "1h", "'1h'"),
        ("max_age", math.inf, "inf"),
        ("on_retry_exhausted", len, repr(len)),
        pytest.param("timeout", 10**5_000, "a int", id="timeout-five thousand digits"),
        ("idempotency_ttl", timedelta.max, repr(timedelta.max)),
    ],
    # The same in every process that collects the tests.
    ids=lambda value: re.sub(r" at 0x\w+", "", repr(value)),
)
def test_a_bad_declaration_names_actor_option_expected_and_got(option, value, got):
    stage = Stage()
    with pytest.raises(ConfigurationError) as raised:
        failing(stage, name="send_mail", **{option: value})
    text = str(raised.value)
    assert text.startswith(f"actor 'send_mail': {option}: expected ")
    assert f", got {repr(value) if got is None else got}." in text


def test_an_option_that_can_t_even_be_looked_at_is_refused_and_not_left_to_dramatiq_which_would_go_on():
    class Hostile(dict):
        def items(self):
            raise RuntimeError("no")

    with pytest.raises(ConfigurationError, match=r"actor 'pay': its options can't be read \(RuntimeError: no\)"):
        failing(Stage(), tags=Hostile())


def test_stock_s_options_may_be_timedeltas_and_a_retry_without_end_stays_one():
    stage = Stage()

    @stage.actor(min_backoff=timedelta(milliseconds=1), max_backoff=timedelta(milliseconds=2), max_retries=1)
    def pay():
        raise PaymentError

    pay.send()
    stage.run()
    assert stage.outcomes() == ["retried", "dead"]
    assert stage.events[0].delay_ms <= 2
    stage.actor(lambda: None, actor_name="endless", max_retries=math.inf, max_age=timedelta(hours=1), max_backoff=7)
    assert stage.broker.actors["endless"].options["max_age"] == 3_600_000


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("max_retries", "3"),
        ("min_backoff", -1),
        ("max_backoff", "1h"),
        ("retry_when", len),
        ("on_outcome", [lambda: 1]),
    ],
)
def test_so_are_those_of_the_middleware(argument, value):
    with pytest.raises(ConfigurationError, match=f"ErrorClassifier: {argument}: expected .*, got "):
        ErrorClassifier(**{argument: value})
    assert ErrorClassifier(min_backoff=timedelta(seconds=1)).min_backoff == 1_000


def test_one_class_under_two_verbs_of_one_actor_is_refused():
    with pytest.raises(ConfigurationError, match=r"actor 'pay': alert_on: expected each class once"):
        failing(Stage(), retry_on=PaymentError, alert_on=PaymentError)


def test_an_actor_that_was_refused_can_be_declared_again():
    stage = Stage()
    with pytest.raises(ConfigurationError):
        failing(stage, retry_on=5)
    failing(stage, PaymentError(), retry_on={PaymentError: SOON}).send()
    assert stage.run().outcomes() == ["retried", "succeeded"]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("retry_on", 5),
        ("unclassified", 5),
        ("max_attempts", 0),
        ("max_attempts", True),
        ("alert_interval", -1),
        ("max_snooze", "1h"),
        ("after_discard", later),
        ("retry_when", later),
        ("on_outcome", later),
        ("on_outcome", [print, 5]),
        ("dead_letter_discards", "yes"),
    ],
)
def test_a_bad_argument_of_the_classifier_is_a_configuration_error(argument, value):
    with pytest.raises(ConfigurationError, match=rf"ErrorClassifier: {argument}: expected .*, got "):
        ErrorClassifier(**{argument: value})


def test_the_defaults_are_those_that_are_documented():
    ours = ErrorClassifier()
    assert (ours.max_attempts, ours.alert_interval, ours.max_snooze) == (25, 300_000, 7 * 24 * 3_600_000)
    assert ours.dead_letter_discards is False


def test_one_attempt_in_all_is_a_cap():
    assert ErrorClassifier(max_attempts=1).max_attempts == 1


def test_an_unknown_argument_is_a_type_error():
    with pytest.raises(TypeError, match=r"^ErrorClassifier\(\) got an unexpected keyword argument 'retries'$"):
        ErrorClassifier(retries=5)


def test_an_unknown_actor_option_is_refused_by_dramatiq():
    with pytest.raises(ValueError, match="retry_of"):
        failing(Stage(), retry_of=PaymentError)


def test_a_class_based_actor_declares_its_rules_in_its_meta():
    stage = Stage()

    class Pay(dramatiq.GenericActor):
        class Meta:
            broker = stage.broker
            discard_on = CardDeclined
            tags = {"team": "billing"}  # noqa: RUF012

        def perform(self):
            raise CardDeclined

    Pay.send()
    assert stage.run().outcomes() == ["discarded"]
    assert stage.events[0].tags == {"team": "billing"}


# Bad endings are told.


def test_after_discard_runs_once_the_actors_before_the_brokers():
    calls = []
    stage = Stage(after_discard=lambda message, error: calls.append(("broker", message.args, error)))
    error = PaymentError()
    options = {
        "retry_on": {PaymentError: SOON},
        "after_discard": lambda message, error: calls.append(("actor", message.args, error)),
    }
    always(stage, error, **options).send(7)
    stage.run()
    assert calls == [("actor", (7,), error), ("broker", (7,), error)]


@pytest.mark.parametrize(
    ("error", "options", "calls"),
    [
        (CardDeclined(), {"discard_on": CardDeclined}, 1),
        (CardDeclined(), {"alert_on": CardDeclined}, 1),
        (CardDeclined(), {"max_retries": 0}, 1),
        (CardDeclined(), {"throws": CardDeclined}, 1),
        (Discard(), {}, 1),
    ],
)
def test_after_discard_is_told_of_each_bad_ending(error, options, calls):
    told = []
    outcomes_of(error, after_discard=lambda message, error: told.append(error), **options)
    assert told == [error] * calls


def test_after_discard_is_not_told_of_retries_snoozes_and_successes():
    told = []
    stage = Stage(after_discard=lambda message, error: told.append(error))
    failing(stage, PaymentError(), Snooze(0), retry_on={PaymentError: SOON}).send()
    assert stage.run().outcomes() == ["retried", "deferred", "succeeded"]
    assert told == []


def test_after_discard_gets_a_stand_in_where_the_job_raised_nothing():
    told = []
    stage = Stage(after_discard=lambda message, error: told.append(type(error)))
    failing(stage, queue_timeout=60_000)
    raw(stage)
    stage.run()
    assert told == [QueueTimeoutExceeded]


def test_an_after_discard_that_raises_is_logged_and_changes_nothing(caplog):
    told = []
    stage = Stage(after_discard=lambda message, error: told.append(error))
    always(stage, CardDeclined(), discard_on=CardDeclined, after_discard=lambda message, error: 1 // 0).send()
    assert stage.run().outcomes() == ["discarded"]
    assert len(told) == 1
    assert "ZeroDivisionError" in caplog.text


def test_a_subscriber_that_raises_keeps_nobody_else_from_the_record(caplog):
    seen = []
    broker = StubBroker()
    install(broker, error_classifier=ErrorClassifier(on_outcome=(lambda event: 1 // 0, seen.append)))
    dramatiq.actor(lambda: None, actor_name="pay", broker=broker).send()
    worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=1)
    worker.start()
    broker.join("default", timeout=10_000)
    worker.stop()
    assert [event.outcome for event in seen] == ["succeeded"]
    assert "ZeroDivisionError" in caplog.text


def test_a_success_needs_no_record_where_nobody_asked_for_it():
    silent, told = (install(StubBroker(), error_classifier=ErrorClassifier(on_outcome=o)) for o in (None, print))
    assert not state_of(silent).successes_observed
    assert state_of(told).successes_observed


# What a dead letter says.


def test_a_dead_letter_says_why():
    stage = Stage()
    errors = [PaymentError("first"), PaymentError("second"), CardDeclined("third")]
    failing(stage, *errors, retry_on={PaymentError: SOON}).send(1, for_="you")
    (failure,) = stage.run().failures()
    assert set(failure) == {
        "outcome",
        "reason",
        "exception",
        "message",
        "traceback",
        "attempts",
        "history",
        "failed_at",
    }
    assert (failure["outcome"], failure["reason"], failure["attempts"]) == ("dead", "exhausted", 3)
    assert (failure["exception"], failure["message"]) == (f"{__name__}.CardDeclined", "third")
    assert failure["traceback"].endswith("CardDeclined: third\n")
    assert 0 <= time.time() * 1_000 - failure["failed_at"] < 60_000
    assert [(run["attempt"], run["message"], run["delay_ms"]) for run in failure["history"]] == [
        (1, "first", 0),
        (2, "second", 0),
        (3, "third", None),
    ]
    assert set(failure["history"][0]) == {"attempt", "exception", "message", "failed_at", "delay_ms"}
    (letter,) = stage.dead
    assert (list(letter.args), letter.kwargs, letter.queue_name) == ([1], {"for_": "you"}, "default")
    json.loads(letter.encode())


@pytest.mark.parametrize(
    ("error", "declared"),
    [
        (CardDeclined("no"), {"alert_on": CardDeclined}),
        (CardDeclined("no"), {"discard_on": CardDeclined}),
        (Discard("no"), {}),
    ],
)
def test_a_run_that_ended_without_a_retry_is_in_its_dead_letters_history(error, declared):
    (failure,) = outcomes_of(error, dead_letter_discards=True, **declared).failures()
    assert [(run["attempt"], run["message"], run["delay_ms"]) for run in failure["history"]] == [(1, "no", None)]
    assert failure["attempts"] == 1


def test_a_dead_letter_of_the_stock_retries_has_its_history_too():
    stage = outcomes_of(PaymentError("no"), max_retries=1, min_backoff=5, max_backoff=5)
    (failure,) = stage.failures()
    waited = stage.events[0].delay_ms
    assert [(run["attempt"], run["delay_ms"]) for run in failure["history"]] == [(1, waited), (2, None)]


def test_a_dead_letter_has_its_actors_tags():
    stage = Stage()
    failing(stage, CardDeclined, alert_on=CardDeclined, tags={"team": "billing"}).send()
    (failure,) = stage.run().failures()
    assert failure["tags"] == {"team": "billing"}


def test_a_dead_letters_texts_and_history_are_cut():
    def deep(depth):
        if depth:
            deep(depth - 1)
        raise PaymentError("x" * 100_000)

    stage = Stage()

    @stage.actor(retry_on={PaymentError: RetryPolicy(attempts=15, wait=0)})
    def pay():
        deep(100)

    pay.send()
    (failure,) = stage.run().failures()
    assert failure["attempts"] == 15
    assert len(failure["message"]) == 1_000
    assert len(failure["traceback"]) <= 10_000
    assert [run["attempt"] for run in failure["history"]] == list(range(6, 16))
    assert {len(run["message"]) for run in failure["history"]} == {1_000}


def test_an_error_whose_text_is_broken_changes_nothing():
    class Broken(Exception):
        def __str__(self):
            raise RuntimeError

    stage = outcomes_of(Broken(), alert_on=Broken)
    assert stage.outcomes() == ["alerted"]
    assert "RuntimeError" in stage.failures()[0]["message"]


# Results.


@pytest.mark.parametrize(
    ("error", "options", "outcome"),
    [
        (CardDeclined("no"), {"discard_on": CardDeclined}, "discarded"),
        (CardDeclined("no"), {"alert_on": CardDeclined}, "alerted"),
        (CardDeclined("no"), {"retry_on": {CardDeclined: RetryPolicy(attempts=2, wait=0)}}, "dead"),
    ],
)
def test_whoever_waits_for_a_result_is_told_how_it_ended(error, options, outcome):
    backend = StubBackend()
    stage = Stage(middleware=[Results(backend=backend)])
    message = always(stage, error, store_results=True, **options).send()
    stage.run()
    with pytest.raises(ResultFailure) as raised:
        message.get_result(backend=backend)
    assert raised.value.orig_exc_type == "CardDeclined"
    assert raised.value.orig_exc_msg.startswith(outcome)


@pytest.mark.parametrize("options", [{"max_retries": 0}, {"throws": CardDeclined}])
def test_where_no_rule_decided_a_failed_result_says_what_dramatiq_says(options):
    backend = StubBackend()
    stage = Stage(middleware=[Results(backend=backend)])
    message = always(stage, CardDeclined("no"), store_results=True, **options).send()
    stage.run()
    with pytest.raises(ResultFailure) as raised:
        message.get_result(backend=backend)
    assert (raised.value.orig_exc_type, raised.value.orig_exc_msg) == ("CardDeclined", "no")


def test_whoever_waits_for_the_result_of_an_expired_message_is_told():
    backend = StubBackend()
    stage = Stage(middleware=[Results(backend=backend)])
    pay = failing(stage, store_results=True, queue_timeout=60_000)
    message = pay.message()
    raw(stage, message_id=message.message_id)
    stage.run()
    with pytest.raises(ResultFailure) as raised:
        message.get_result(backend=backend)
    assert raised.value.orig_exc_type == "QueueTimeoutExceeded"
    assert raised.value.orig_exc_msg.startswith("expired")


def test_the_result_of_a_success_is_the_jobs_own():
    backend = StubBackend()
    stage = Stage(middleware=[Results(backend=backend)])
    message = failing(stage, PaymentError(), result="paid", store_results=True, retry_on={PaymentError: SOON}).send()
    stage.run()
    assert message.get_result(backend=backend) == "paid"


# Pipelines and groups.


def test_a_pipeline_goes_on_after_a_success_and_stops_at_a_discard():
    stage = Stage()
    seen = []
    first = stage.actor(lambda x: x + 1, actor_name="first", queue_name="one")
    last = stage.actor(seen.append, actor_name="last", queue_name="two")
    stops = always(stage, CardDeclined(), name="stops", discard_on=CardDeclined)
    pipeline([first.message(1), first.message(), last.message()], broker=stage.broker).run()
    pipeline([stops.message(), last.message()], broker=stage.broker).run()
    stage.run()
    assert seen == [3]
    assert stage.outcomes("stops") == ["discarded"]


def test_a_pipeline_goes_on_after_a_retry():
    stage = Stage()
    seen = []
    last = stage.actor(seen.append, actor_name="last")
    pay = failing(stage, PaymentError(), result="paid", retry_on={PaymentError: SOON})
    pipeline([pay.message(), last.message()], broker=stage.broker).run()
    stage.run()
    assert seen == ["paid"]


def test_a_groups_callback_runs_once_its_members_are_done():
    stage = Stage(middleware=[GroupCallbacks(RateLimiterStubBackend())])
    done = []
    finished = stage.actor(lambda: done.append(1), actor_name="finished")
    pay = failing(stage, PaymentError(), retry_on={PaymentError: SOON})
    members = group([pay.message(), pay.message()], broker=stage.broker)
    members.add_completion_callback(finished.message())
    members.run()
    stage.run()
    assert done == [1]


def test_on_retry_exhausted_is_told_when_a_rule_is_exhausted():
    stage = Stage()
    told = []
    stage.actor(lambda message, info: told.append((message["actor_name"], info)), actor_name="tell")
    always(stage, PaymentError(), retry_on={PaymentError: SOON}, on_retry_exhausted="tell").send()
    stage.run()
    assert told == [("pay", {"retries": 2, "max_retries": 2})]


@pytest.mark.parametrize(
    ("declared", "told"),
    [({"discard_on": PaymentError}, 0), ({"retry_on": {PaymentError: RetryPolicy(attempts=1, then="discard")}}, 1)],
)
def test_on_retry_exhausted_is_told_of_a_discard_that_used_up_its_retries_and_of_no_other(declared, told):
    stage = Stage()
    calls = []
    stage.actor(lambda message, info: calls.append(info), actor_name="tell")
    always(stage, PaymentError(), on_retry_exhausted="tell", **declared).send()
    assert stage.run().outcomes("pay") == ["discarded"]
    assert len(calls) == told


def test_an_error_that_no_decision_can_be_made_on_is_a_dead_letter_that_says_so(monkeypatch, caplog):
    stage = Stage()
    always(stage, PaymentError("declined")).send()

    def broken(*args):
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("dramatiq_policies.middleware.error_classifier.decide", broken)
    stage.run()
    assert (stage.outcomes(), stage.reasons()) == (["dead"], ["handoff_failed"])
    assert "ZeroDivisionError: by nothing" in str(stage.events[0].exception)
    assert len(stage.dead) == 1
    assert "No decision could be made on message" in caplog.text


def test_a_retry_when_that_raises_leaves_a_dead_letter_that_says_so():
    stage = outcomes_of(PaymentError(), retry_when=lambda retries, error: 1 // 0)
    assert (stage.outcomes(), stage.reasons()) == (["dead"], ["handoff_failed"])
    assert "ZeroDivisionError" in str(stage.events[0].exception)


class Refused(MiddlewareError):
    pass


class Refusing(Middleware):
    """Raises before any hook of ours."""

    def __init__(self, error):
        self.error = error

    def before_process_message(self, broker, message):
        raise self.error


@pytest.mark.parametrize(
    ("error", "declared", "outcomes"),
    [
        (Refused(), {"discard_on": Refused}, ["discarded"]),
        (Refused(), {"retry_on": {Refused: 2}}, ["retried", "dead"]),
        (Refused(), {"throws": Refused}, ["dead"]),
        (Refused(), {"max_retries": 1}, ["retried", "dead"]),
        (Shutdown(), {"max_retries": 0}, ["dead"]),
    ],
)
def test_an_error_of_a_middleware_before_the_job_is_decided_on_by_the_actors_rules(error, declared, outcomes):
    stage = Stage(middleware=[Refusing(error)])
    runs = []
    stage.actor(runs.append, actor_name="pay", min_backoff=1, max_backoff=1, **declared).send(1)
    stage.run()
    assert (stage.outcomes(), runs) == (outcomes, [])


# The hand-off.


def broken_enqueue(stage, error, times=10**9):
    """From now on the broker does not take messages, `times` times."""
    stock = stage.broker.enqueue
    failed = []

    def enqueue(message, *, delay=None):
        if len(failed) < times:
            failed.append(message)
            raise error
        return stock(message, delay=delay)

    stage.broker.enqueue = enqueue
    return failed


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(publishing, "_RETRY_REFUSAL_FOR", 0.05)
    monkeypatch.setattr(publishing, "_RETRY_PAUSES", (0.0, 0.01))


@pytest.mark.parametrize("error", [ConnectionClosed(OSError("gone")), ConnectionResetError()])
def test_a_retry_that_meets_a_lost_connection_is_handed_off_once_it_is_back(impatient, error, caplog):
    stage = Stage()
    failing(stage, PaymentError(), retry_on={PaymentError: SOON}).send()
    failed = broken_enqueue(stage, error, times=20)
    assert stage.run().outcomes() == ["retried", "succeeded"]
    assert len(failed) == 20
    # Which is said at the first try, and not at each.
    assert caplog.text.count("The broker did not take what follows message") == 1


def test_an_error_that_is_over_before_the_patience_is_changes_nothing():
    stage = Stage()
    failing(stage, PaymentError(), retry_on={PaymentError: SOON}).send()
    broken_enqueue(stage, RuntimeError("no"), times=2)
    assert stage.run().outcomes() == ["retried", "succeeded"]


def test_so_it_is_by_a_worker_that_started_after_another_had_stopped(impatient):
    stage = Stage()
    pay = failing(stage, PaymentError(), retry_on={PaymentError: SOON})
    stage.run()
    pay.send()
    broken_enqueue(stage, ConnectionResetError(), times=20)
    assert stage.run().outcomes() == ["retried", "succeeded"]


def test_a_retry_that_the_broker_will_not_take_is_dead_and_not_lost(impatient):
    told = []
    stage = Stage(after_discard=lambda message, error: told.append(type(error)))
    always(stage, PaymentError(), retry_on={PaymentError: SOON}).send()
    broken_enqueue(stage, RuntimeError("no"))
    assert stage.run().outcomes() == ["dead"]
    assert stage.reasons() == ["handoff_failed"]
    assert told == [HandoffFailed]
    assert stage.failures()[0]["reason"] == "handoff_failed"
    assert "RuntimeError: no" in stage.failures()[0]["message"]
    assert [run["exception"].rpartition(".")[2] for run in stage.failures()[0]["history"]] == ["PaymentError"]


def test_a_next_stage_that_the_broker_will_not_take_is_dead_and_not_lost(impatient):
    stage = Stage()
    pay = failing(stage)
    pipeline([pay.message(), pay.message()], broker=stage.broker).run()
    broken_enqueue(stage, RuntimeError("no"))
    assert stage.run().outcomes() == ["dead"]
    assert stage.reasons() == ["handoff_failed"]


def test_on_retry_exhausted_that_can_not_be_told_is_said_and_changes_nothing(caplog):
    stage = Stage()
    always(stage, PaymentError(), retry_on={PaymentError: RetryPolicy(attempts=1)})
    raw(stage, options={"on_retry_exhausted": "nobody"})
    assert stage.run().reasons() == ["exhausted"]
    assert "on_retry_exhausted 'nobody' could not be told" in caplog.text


def test_nor_does_it_where_the_stock_options_decide(caplog):
    stage = Stage()
    always(stage, PaymentError(), max_retries=0)
    raw(stage, options={"on_retry_exhausted": "nobody"})
    assert stage.run().reasons() == ["unclassified"]
    assert "on_retry_exhausted 'nobody' could not be told" in caplog.text


def test_a_failure_that_the_result_backend_will_not_store_is_said_and_changes_nothing(caplog, monkeypatch):
    results = Results(backend=StubBackend(), store_results=True)
    monkeypatch.setattr(results.backend, "store_exception", None)
    stage = Stage(middleware=[results])
    message = always(stage, PaymentError(), discard_on=PaymentError).send()
    assert stage.run().outcomes() == ["discarded"]
    assert f"The result of message {message.message_id} could not be stored." in caplog.text


def test_a_group_whose_barrier_is_somewhere_else_calls_back_once():
    class Elsewhere:
        """A backend that is neither Dramatiq's for Redis nor the one in memory."""

        def __init__(self):
            self.kept = RateLimiterStubBackend()

        def __getattr__(self, name):
            return getattr(self.kept, name)

    stage = Stage(middleware=[GroupCallbacks(Elsewhere())])
    pay = failing(stage)
    done = failing(stage, name="done")
    members = group([pay.message(), pay.message()], broker=stage.broker)
    members.add_completion_callback(done.message())
    members.run()
    assert stage.run().outcomes("pay") == ["succeeded", "succeeded"]
    assert stage.outcomes("done") == ["succeeded"]


def test_a_hand_off_given_up_at_shutdown_leaves_the_message_for_the_next_worker(impatient):
    stage = Stage()
    pay = failing(stage, PaymentError(), retry_on={PaymentError: SOON})
    message = pay.send()
    stock = stage.broker.enqueue
    failed = broken_enqueue(stage, ConnectionClosed(OSError("gone")))
    with stage.working():
        deadline = time.monotonic() + 10
        while len(failed) < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
    assert (stage.outcomes()[0], stage.reasons()[0]) == ("interrupted", "handoff_failed")
    stage.broker.enqueue = stock
    stage.run()
    # A thread that was already waiting for work may run it before its worker has stopped.
    assert stage.outcomes() == ["interrupted", "succeeded"]
    assert {event.message_id for event in stage.events} == {message.message_id}


# Shutdown.


def test_a_job_that_shutdown_interrupts_comes_back_and_has_used_no_attempt():
    stage = Stage(middleware=[], broker=StubBroker(middleware=[ShutdownNotifications(notify_shutdown=True), Retries()]))
    started = threading.Event()
    raised = []

    @stage.actor(retry_on={PaymentError: 1})
    def slow():
        started.set()
        deadline = time.monotonic() + 10
        try:
            while not raised and time.monotonic() < deadline:
                time.sleep(0.001)
        except Shutdown as error:
            raised.append(error)
            raise

    slow.send()
    with stage.working():
        assert started.wait(10)
    assert len(raised) == 1
    assert stage.outcomes()[0] == "interrupted"
    stage.run()
    assert stage.outcomes() == ["interrupted", "succeeded"]
    assert [event.attempt for event in stage.events] == [1, 1]


@pytest.mark.parametrize("others", [[], [ShutdownNotifications()]])
def test_what_a_worker_fetches_while_it_shuts_down_is_left_for_the_next(others):
    stage = Stage(broker=StubBroker(middleware=[*others, Retries()]))
    pay = failing(stage)
    with stage.working() as worker:
        stage.broker.emit_before("worker_shutdown", worker)
        pay.send()
        consumer = worker.consumers["default"].consumer
        deadline = time.monotonic() + 10
        while not (consumer.set_aside or stage.events) and time.monotonic() < deadline:
            time.sleep(0.005)
    assert stage.events == []
    assert stage.run().outcomes() == ["succeeded"]


def test_a_job_that_shutdown_interrupts_and_that_may_not_be_retried_is_dead():
    stage = Stage(middleware=[], broker=StubBroker(middleware=[ShutdownNotifications(notify_shutdown=True), Retries()]))
    always(stage, Shutdown(), max_retries=0).send()
    stage.run()
    assert (stage.outcomes(), stage.reasons()) == (["dead"], ["unclassified"])
    assert len(stage.dead) == 1


@pytest.mark.parametrize(
    ("classifier", "actor", "message", "outcome"),
    [
        (0, None, None, "dead"),
        (0, 1, None, "interrupted"),
        (1, 0, None, "dead"),
        (1, 0, 1, "interrupted"),
        (1, 1, 0, "dead"),
    ],
)
def test_whether_it_may_be_retried_the_message_says_before_its_actor_and_the_classifier(
    classifier, actor, message, outcome
):
    stage = Stage(max_retries=classifier)
    failing(stage, Shutdown(), **({} if actor is None else {"max_retries": actor}))
    raw(stage, options={} if message is None else {"max_retries": message})
    assert stage.run().outcomes()[0] == outcome


# The job's own view.


def test_current_job_is_the_job_that_runs_here_and_none_elsewhere():
    stage = Stage()
    seen = []

    @stage.actor(queue_name="money", timeout=60_000, retry_on={PaymentError: SOON})
    def pay():
        job = current_job()
        seen.append((job.message_id, job.actor, job.queue, job.attempt, job.idempotency_key))
        assert 0 < job.remaining_ms() <= 60_000
        if job.attempt == 1:
            raise PaymentError

    assert current_job(None) is None
    message = pay.send()
    assert stage.run().outcomes() == ["retried", "succeeded"]
    expected = (message.message_id, "pay", "money")
    assert seen == [(*expected, 1, message.message_id), (*expected, 2, message.message_id)]
    assert current_job(None) is None


def test_current_job_is_none_in_every_other_hook_and_after_the_job():
    seen = []

    class Looking(Middleware):
        def before_process_message(self, broker, message):
            seen.append(current_job(None))

        def after_process_message(self, broker, message, *, result=None, exception=None):
            seen.append(current_job(None))

    stage = Stage(middleware=[Looking()])
    failing(stage).send()
    stage.run()
    assert seen == [None, None]


@pytest.mark.parametrize(("error", "outcome"), [(SkipMessage(), "skipped"), (Refused(), "dead")], ids=repr)
def test_an_actor_that_is_called_after_a_message_did_not_run_is_not_that_messages_job(error, outcome):
    stage = Stage()
    seen = []

    class Calling(Refusing):
        def after_ack(self, broker, message):
            seen.append(pay())

        after_nack = after_ack

    pay = stage.actor(lambda: current_job(None), actor_name="pay", max_retries=0)
    stage.broker.add_middleware(Calling(error))
    pay.send()
    assert stage.run().outcomes() == [outcome]
    assert seen == [None]


def test_outside_of_a_job_current_job_raises_or_gives_its_default():
    with pytest.raises(NoCurrentJob, match=r"outside of a job.*current_job\(None\).*copy_context") as caught:
        current_job()
    assert isinstance(caught.value, LookupError)
    assert current_job(None) is None
    assert current_job("shell") == "shell"
    with pytest.raises(TypeError, match="at most 1 argument"):
        current_job(1, 2)


def test_an_actor_that_is_called_directly_says_that_no_job_runs():
    pay = Stage().actor(lambda: current_job().attempt, actor_name="pay")
    with pytest.raises(NoCurrentJob):
        pay()


def test_a_thread_that_a_job_starts_sees_the_job_in_the_jobs_context_or_through_what_it_is_handed():
    stage = Stage()
    seen = []

    @stage.actor
    def pay():
        job = current_job()
        with ThreadPoolExecutor(1) as threads:
            seen.append(threads.submit(current_job, None).result())
            seen.append(threads.submit(contextvars.copy_context().run, lambda: current_job().actor).result())
            seen.append(threads.submit(lambda: job.actor).result())

    pay.send()
    assert stage.run().outcomes() == ["succeeded"]
    assert seen == [None, "pay", "pay"]


def test_a_nested_call_of_an_actor_sees_the_job_that_calls_it():
    stage = Stage()
    inner = stage.actor(lambda: current_job().actor, actor_name="inner")
    seen = []
    outer = stage.actor(lambda: seen.append((inner(), current_job().actor)), actor_name="outer")
    outer.send()
    assert stage.run().outcomes() == ["succeeded"]
    assert seen == [("outer", "outer")]


def test_an_async_job_is_classified_and_sees_itself():
    stage = Stage(middleware=[AsyncIO()])
    seen = []

    @stage.actor(retry_on={PaymentError: SOON})
    async def pay():
        job = current_job()
        seen.append((job.actor, job.attempt))
        if job.attempt < 3:
            raise PaymentError

    pay.send()
    assert stage.run().outcomes() == ["retried", "retried", "succeeded"]
    assert seen == [("pay", 1), ("pay", 2), ("pay", 3)]


def test_an_actor_called_directly_raises_what_it_raises():
    pay = always(Stage(), CardDeclined(), discard_on=CardDeclined)
    with pytest.raises(CardDeclined):
        pay()


# Hostile messages.

HOSTILE = [None, True, -1, 0, 1, 10**30, 1e308, float("nan"), float("-inf"), "x", "", [], [1], {}, {"a": 1}]
OPTIONS = [
    "throws",
    "retries",
    "max_retries",
    "min_backoff",
    "max_backoff",
    "max_age",
    "time_limit",
    "timeout",
    "queue_timeout",
    "result_ttl",
    "store_results",
    "on_failure",
    "on_success",
    "on_retry_exhausted",
    "notify_shutdown",
    "broker_priority",
    "policies",
    "failure",
    "ready_at",
    "requeue_timestamp",
    "traceback",
    "pipe_ignore",
    "pipe_target",
    "group_completion_uuid",
    "group_completion_callbacks",
    "retry_on",
    "idempotency_key",
    "redis_message_id",
    "delay",
]


@pytest.mark.parametrize("raises", [None, CardDeclined, OSError, Snooze(60_000), Retry()], ids=repr)
def test_no_value_of_a_message_option_ends_a_thread_or_leaves_a_message_without_its_outcome(raises):
    stage = Stage(middleware=[Results(backend=StubBackend()), GroupCallbacks(RateLimiterStubBackend())])

    @stage.actor(retry_on={CardDeclined: 2}, max_age=10**15, store_results=True)
    def pay():
        if raises is not None:
            raise raises

    ids = []
    for number, (option, value) in enumerate(itertools.product(OPTIONS, HOSTILE)):
        ids.append(f"{option}-{value!r}-{number}")
        raw(stage, options={option: value}, message_id=ids[-1])
    with stage.working(threads=4) as worker:
        stage.collected.wait_for(lambda events: {e.message_id for e in events} >= set(ids), "an outcome for each")
        assert all(thread.is_alive() for thread in worker.workers)
    firsts = [event.message_id for event in stage.events if event.message_id in ids]
    assert len(set(firsts)) == len(ids)


def test_of_a_time_that_is_none_dramatiq_itself_warns(caplog):
    stage = Stage()
    failing(stage)
    raw(stage, options={"eta": "soon"})
    stage.run()
    assert "Invalid eta value" in caplog.text


@pytest.mark.parametrize("eta", [v for v in HOSTILE if v not in (10**30, 1e308)], ids=repr)
def test_a_hostile_eta_runs_now(eta):
    stage = Stage()
    failing(stage)
    raw(stage, options={"eta": eta}, message_id="hostile")
    raw(stage, options={"eta": 5}, message_id="due")
    raw(stage, message_id="good")
    stage.run()
    assert sorted(event.message_id for event in stage.events) == ["due", "good", "hostile"]
    assert stage.outcomes() == ["succeeded"] * 3


@pytest.mark.parametrize(
    "policies",
    [
        {"runs": 5},
        {"runs": {f"{__name__}.CardDeclined": "x"}},
        {"runs": {f"{__name__}.CardDeclined": [-1, 0]}},
        {"runs": {f"{__name__}.CardDeclined": [True, None]}},
        {"total": -5, "history": [1, None, {}]},
        {"history": {"a": 1}, "snoozed_since": "yesterday"},
    ],
)
def test_counters_that_can_not_be_read_are_taken_as_absent(policies):
    stage = Stage()
    always(stage, CardDeclined(), retry_on={CardDeclined: RetryPolicy(attempts=2, wait=0)})
    raw(stage, options={"policies": policies})
    assert stage.run().outcomes() == ["retried", "dead"]


BODIES = {
    "no JSON": b"\x80 not json",
    "nothing": b"",
    "null": b"null",
    "a list": b"[1, 2]",
    "a number": b"5",
    "no fields": b"{}",
    "unknown fields": b'{"a": 1}',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_body_that_can_not_be_read_is_dead_lettered_raw_and_the_next_message_runs(body):
    stage = Stage()
    failing(stage)
    stage.broker.queues["default"].put(body)
    raw(stage, message_id="good")
    stage.run()
    malformed, good = sorted(stage.events, key=lambda event: event.outcome)
    assert (malformed.outcome, malformed.reason, malformed.queue) == ("dead", "malformed", "default")
    assert malformed.actor is malformed.message_id is malformed.attempt is malformed.duration_ms is None
    assert (good.outcome, good.message_id) == ("succeeded", "good")
    assert len(stage.dead) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"options": None},
        {"options": []},
        {"message_id": 5},
        {"message_id": None},
        {"kwargs": None},
        {"kwargs": [1]},
        {"args": None},
        {"args": 5},
        {"actor_name": None},
        {"actor_name": ["pay"]},
        {"queue_name": 5},
        {"queue_name": None},
        {"message_timestamp": "now"},
        {"message_timestamp": None},
        {"message_timestamp": float("nan")},
        {"more": 1},
    ],
    ids=repr,
)
def test_a_field_of_the_wrong_type_is_malformed_and_the_next_message_runs(changes):
    stage = Stage()
    failing(stage)
    raw(stage, **changes)
    raw(stage, message_id="good")
    stage.run()
    assert sorted(zip(stage.outcomes(), stage.reasons(), strict=True), key=str) == [
        ("dead", "malformed"),
        ("succeeded", None),
    ]


@pytest.mark.parametrize(
    "target",
    [
        5,
        "x",
        [],
        {"actor_name": "pay"},
        {"queue_name": 1, "actor_name": "pay", "args": [], "kwargs": {}, "options": {}},
        {"queue_name": "default", "actor_name": "pay", "args": 5, "kwargs": {}, "options": {}},
    ],
    ids=repr,
)
def test_a_next_stage_that_is_no_message_is_malformed_before_the_job_runs(target):
    stage = Stage()
    ran = []
    stage.actor(lambda: ran.append(1), actor_name="pay")
    raw(stage, options={"pipe_target": target})
    raw(stage, message_id="good")
    stage.run()
    assert sorted(stage.outcomes()) == ["dead", "succeeded"]
    assert "malformed" in stage.reasons()
    assert ran == [1]


def test_a_next_stage_for_an_actor_that_nobody_knows_is_handed_on_where_it_is_dead(impatient):
    stage = Stage()
    failing(stage)
    target = {"queue_name": "nowhere", "actor_name": "nobody", "args": [], "kwargs": {}, "options": {}}
    raw(stage, options={"pipe_target": target})
    raw(stage, message_id="good")
    stage.run()
    assert sorted(stage.outcomes()) == ["dead", "succeeded"]


def test_a_message_runs_from_the_queue_that_it_was_read_from_whatever_it_says():
    stage = Stage()
    failing(stage)
    raw(stage, queue="elsewhere")
    (event,) = stage.run().events
    assert (event.outcome, event.queue) == ("succeeded", "default")


def test_a_message_in_flight_from_stock_dramatiq_is_handled():
    stage = Stage()
    always(stage, CardDeclined(), retry_on={CardDeclined: RetryPolicy(attempts=2, wait=0)})
    raw(stage, options={"retries": 3, "traceback": "…", "requeue_timestamp": 5})
    assert stage.run().outcomes() == ["retried", "dead"]
    assert [event.attempt for event in stage.events] == [4, 5]


# Log lines.

SECRET = "4111-1111"


def lines(caplog):
    return [r for r in caplog.records if r.name.startswith("dramatiq") and r.levelno >= logging.WARNING]


def test_a_retried_error_is_one_warning_line_with_its_fields(caplog):
    stage = Stage()
    message = failing(stage, PaymentError("no"), retry_on={PaymentError: SOON}, tags={"team": "billing"}).send()
    stage.run()
    (record,) = lines(caplog)
    assert (record.levelno, record.name, record.exc_info) == (logging.WARNING, "dramatiq_policies.outcomes", None)
    fields = ("outcome", "reason", "actor", "queue", "message_id", "attempt", "exception_type", "exception_text")
    assert [getattr(record, field) for field in fields] == [
        "retried",
        None,
        "pay",
        "default",
        message.message_id,
        1,
        f"{__name__}.PaymentError",
        "no",
    ]
    assert record.tags == {"team": "billing"}
    assert record.rule == f"{__name__}.PaymentError"


def skip(middleware, broker, message):
    raise SkipMessage


def test_what_is_put_back_or_skipped_is_a_line_at_info(caplog):
    caplog.set_level(logging.INFO, "dramatiq_policies.outcomes")
    stage = Stage()
    snoozing = failing(stage, Snooze(0, "the bank is closed")).send()
    stage.run()
    stage.broker.add_middleware(type("Skipping", (Middleware,), {"before_process_message": skip})())
    skipped = stage.broker.actors["pay"].send()
    stage.run()
    assert [r.getMessage() for r in caplog.records if r.name == "dramatiq_policies.outcomes"] == [
        f"deferred: message {snoozing.message_id} of actor pay (snoozed), again in 0 ms: the bank is closed",
        f"skipped: message {skipped.message_id} of actor pay",
    ]


def test_the_line_of_a_retry_names_its_rule_in_words(caplog):
    def is_busy(error):
        return True

    stage = Stage(unclassified=SOON)
    failing(
        stage, PaymentError("no"), KeyError("x"), retry_on={when(PaymentError, is_busy): SOON, MissingKey: SOON}
    ).send()
    stage.run()
    first, second = [r.getMessage() for r in lines(caplog)]
    assert ", again in 0 ms, by the rule for PaymentError when is_busy: PaymentError: no" in first
    assert ", again in 0 ms, unclassified: KeyError: 'x'" in second


def test_the_stack_of_a_dead_message_begins_at_the_users_code_and_is_whole_at_debug(caplog):
    outcomes_of(PaymentError("no"), max_retries=0)
    stack = traceback.extract_tb(lines(caplog)[0].exc_info[2])
    assert [frame.name for frame in stack] == ["pay"]
    caplog.clear()
    caplog.set_level(logging.DEBUG, logger="dramatiq_policies")
    outcomes_of(PaymentError("no"), max_retries=0)
    assert len(traceback.extract_tb(lines(caplog)[0].exc_info[2])) > 3


@pytest.mark.parametrize(("interval", "whole"), [(300_000, 2), (0, 5)])
def test_the_stack_of_one_actors_dead_messages_is_logged_once_per_interval_and_error(interval, whole, caplog):
    stage = Stage(alert_interval=interval)
    pay = failing(stage, *[PaymentError("no")] * 4, KeyError("x"), max_retries=0)
    for _ in range(5):
        pay.send()
    stage.run()
    records = lines(caplog)
    assert [r.levelno for r in records] == [logging.ERROR] * 5
    assert sum(bool(r.exc_info) for r in records) == whole
    assert records[0].exc_info


def test_the_stack_of_a_retried_error_is_at_debug(caplog):
    caplog.set_level(logging.DEBUG, logger="dramatiq_policies")
    stage = Stage()
    failing(stage, PaymentError("no"), retry_on={PaymentError: SOON}).send()
    stage.run()
    assert [r.levelno for r in caplog.records if r.exc_info] == [logging.DEBUG]


@pytest.mark.parametrize(
    ("options", "level", "stack"),
    [
        ({"discard_on": CardDeclined}, logging.WARNING, False),
        ({"throws": CardDeclined}, logging.WARNING, False),
        ({"max_retries": 0}, logging.ERROR, True),
        ({"alert_on": CardDeclined}, logging.CRITICAL, True),
    ],
)
def test_a_bad_ending_is_one_record(options, level, stack, caplog):
    outcomes_of(CardDeclined("no"), **options)
    (record,) = lines(caplog)
    assert record.levelno == level
    assert bool(record.exc_info) is stack


@pytest.mark.parametrize(
    "options",
    [
        {"discard_on": CardDeclined},
        {"retry_on": {CardDeclined: SOON}},
        {"throws": CardDeclined},
        {"max_retries": 1, "min_backoff": 1, "max_backoff": 2},
        {"alert_on": CardDeclined},
        {"max_age": 1},
        {"queue_timeout": 1_000},
    ],
)
def test_no_line_shows_the_arguments(options, caplog):
    caplog.set_level(logging.INFO)
    stage = Stage()
    always(stage, CardDeclined("no"), **options)
    raw(stage, args=[SECRET], kwargs={"card": SECRET})
    stage.run()
    assert len(stage.events) >= 1
    assert SECRET not in caplog.text


def test_the_arguments_are_logged_on_request_only(caplog):
    stage = Stage(bundle={"discard_logger": DiscardLogger(log_args=True, level="error")})
    always(stage, CardDeclined(), discard_on=CardDeclined).send(SECRET)
    stage.run()
    (record,) = lines(caplog)
    assert (record.levelno, list(record.job_args)) == (logging.ERROR, [SECRET])
    assert record.getMessage().endswith(f"; called with args={record.job_args!r} kwargs={{}}")


def test_an_expired_message_is_an_error_with_its_exception(caplog):
    stage = Stage()
    stage.actor(lambda: None, actor_name="late", queue_timeout=timedelta(seconds=1))
    raw(stage, actor="late")
    stage.run()
    (record,) = lines(caplog)
    assert (record.levelno, record.exc_info[0]) == (logging.ERROR, QueueTimeoutExceeded)


def test_without_a_discard_logger_the_worker_says_it(caplog):
    stage = Stage(bundle={"discard_logger": False})
    always(stage, CardDeclined(), discard_on=CardDeclined).send()
    stage.run()
    assert [r.name for r in lines(caplog)] == ["dramatiq.worker.WorkerThread"]


# Putting it on a broker.


def test_installing_twice_is_refused():
    broker = install(StubBroker())
    with pytest.raises(ConfigurationError, match="already"):
        install(broker)


@pytest.mark.parametrize("kind", [ErrorClassifier, Timeout, Idempotency, DiscardLogger])
def test_a_second_middleware_of_one_kind_is_refused_at_the_latest_at_the_first_declaration(kind):
    broker = StubBroker()
    broker.add_middleware(kind())
    with pytest.raises(ConfigurationError, match=kind.__name__):
        broker.add_middleware(kind())
        dramatiq.actor(lambda: None, actor_name="pay", broker=broker)


def test_and_at_the_latest_when_a_worker_boots():
    broker = StubBroker()
    broker.add_middleware(ErrorClassifier())
    broker.add_middleware(ErrorClassifier())
    with pytest.raises(ConfigurationError, match="ErrorClassifier"):
        broker.emit_before("worker_boot", None)


def test_a_subclass_of_one_is_of_its_kind():
    class Mine(Heartbeat):
        pass

    broker = install(StubBroker(), heartbeat=Mine())
    broker.add_middleware(Heartbeat())
    with pytest.raises(ConfigurationError, match="two Heartbeat"):
        dramatiq.actor(lambda: None, actor_name="pay", broker=broker)


def test_one_middleware_on_two_brokers_is_refused():
    classifier = ErrorClassifier()
    install(StubBroker(), error_classifier=classifier)
    with pytest.raises(ConfigurationError, match="another broker"):
        install(StubBroker(), error_classifier=classifier)


def test_an_argument_of_the_wrong_kind_is_refused():
    with pytest.raises(ConfigurationError, match=r"install\(\): timeout: expected a Timeout or None, got 30000"):
        install(StubBroker(), timeout=30_000)
    with pytest.raises(
        ConfigurationError, match=r"install\(\): heartbeat: expected a Heartbeat or None, got a Timeout"
    ):
        install(StubBroker(), heartbeat=Timeout())


def kinds(broker):
    return [type(middleware) for middleware in broker.middleware]


ORDERS = list(itertools.permutations([ErrorClassifier, Timeout, Idempotency, DiscardLogger]))


@pytest.mark.parametrize("order", ORDERS)
def test_one_at_a_time_in_any_order_ends_in_the_same_list_as_install(order):
    broker = StubBroker()
    for kind in order:
        broker.add_middleware(kind())
    dramatiq.actor(lambda: None, actor_name="pay", broker=broker)
    assert kinds(broker) == kinds(install(StubBroker()))


@pytest.mark.parametrize("order", [o for o in ORDERS if o[0] is not ErrorClassifier])
def test_one_at_a_time_works_after_actors_were_declared_where_the_classifier_comes_later(order):
    one_at_a_time_after_an_actor(order)


@pytest.mark.parametrize("order", [o for o in ORDERS if o[0] is ErrorClassifier])
def test_one_at_a_time_works_after_actors_were_declared(order):
    one_at_a_time_after_an_actor(order)


def one_at_a_time_after_an_actor(order):
    broker = StubBroker()
    dramatiq.actor(lambda: None, actor_name="early", broker=broker)
    for kind in order:
        broker.add_middleware(kind())
    dramatiq.actor(lambda: None, actor_name="pay", broker=broker, retry_on=PaymentError)
    assert kinds(broker) == kinds(install(StubBroker()))


def test_the_settings_of_the_stock_middleware_are_kept():
    broker = StubBroker(middleware=[Retries(max_retries=3, min_backoff=5, max_backoff=50)])
    classifier = ErrorClassifier(max_backoff=70)
    install(broker, error_classifier=classifier)
    assert (classifier.max_retries, classifier.min_backoff, classifier.max_backoff) == (3, 5, 70)
    assert not any(type(middleware) is Retries for middleware in broker.middleware)


def test_the_stock_settings_are_dramatiqs_own_by_default():
    names = ("max_retries", "min_backoff", "max_backoff", "retry_when")
    ours, stock = ErrorClassifier(), Retries()
    assert [getattr(ours, name) for name in names] == [getattr(stock, name) for name in names]


def test_a_message_that_no_consumer_of_ours_has_delivered_is_retried_as_stock_does():
    stage = Stage()
    pay = failing(stage)
    stage.broker.emit_after("process_message", MessageProxy(pay.message()), exception=OSError("no"))
    (body,) = stage.broker.queues["default.DQ"].queue
    assert Message.decode(body).options["retries"] == 1
    assert stage.events == []


def test_our_hooks_before_and_around_such_a_message_let_it_pass(caplog):
    stage = Stage()
    message = MessageProxy(failing(stage).message())
    stage.broker.emit_before("process_message", message)
    stage.broker.emit_after("process_message", message, result=None)
    stage.broker.emit_after("skip_message", message)
    assert lines(caplog) == []
    assert not message.failed


def test_a_process_that_only_sends_needs_no_actor():
    broker = StubBroker()
    broker.declare_queue("default")
    broker.add_middleware(ErrorClassifier())
    broker.enqueue(Message("default", "of_another_app", (), {}, {"timeout": timedelta(seconds=5)}))
    (body,) = broker.queues["default"].queue
    options = Message.decode(body).options
    assert options["timeout"] == 5_000
    assert abs(options["ready_at"] - time.time() * 1_000) < 60_000


def test_stock_settings_given_to_the_classifier_are_its_own():
    stage = Stage(max_retries=1, min_backoff=1, max_backoff=2)
    always(stage, OSError()).send()
    assert stage.run().outcomes() == ["retried", "dead"]


def test_middleware_can_be_placed_by_the_names_of_the_stock_ones():
    class Mine(Middleware):
        pass

    broker = install(StubBroker())
    broker.add_middleware(Mine(), before=ErrorClassifier)
    assert kinds(broker).index(Mine) == kinds(broker).index(ErrorClassifier) - 1


def test_retry_when_of_the_stock_retries_keeps_its_meaning():
    stage = outcomes_of(OSError(), retry_when=lambda retries, error: retries < 1, min_backoff=1, max_backoff=2)
    assert stage.outcomes() == ["retried", "dead"]


def test_waits_grow_as_exponential_says():
    stage = Stage()
    policy = RetryPolicy(attempts=4, wait=exponential(initial=2, jitter=0))
    always(stage, PaymentError(), retry_on={PaymentError: policy}).send()
    assert [event.delay_ms for event in stage.run().events] == [2, 4, 8, None]


# What user code can get wrong.


class Broken(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def test_an_error_whose_text_is_broken_ends_as_any_other_also_where_results_are_stored():
    backend = StubBackend()
    stage = Stage(middleware=[Results(backend=backend)])
    message = always(stage, Broken(), store_results=True, discard_on=Broken).send()
    with stage.working():
        stage.collected.wait_for(lambda events: events, patience=2)
    assert stage.outcomes() == ["discarded"]
    with pytest.raises(ResultFailure):
        message.get_result(backend=backend)


def test_a_wait_that_raises_still_retries(caplog):
    stage = Stage()
    policy = RetryPolicy(attempts=2, wait=lambda attempt, error: 1 // 0)
    failing(stage, PaymentError(), retry_on={PaymentError: policy}).send()
    with stage.working():
        stage.collected.wait_for(lambda events: events)
    assert stage.outcomes() == ["retried"]
    assert 15_000 <= stage.events[0].delay_ms <= 17_250


def test_a_predicate_that_raises_does_not_match_and_the_next_rule_counts():
    stage = Stage()
    always(stage, PaymentError(), discard_on=when(PaymentError, lambda e: e.code), alert_on=Exception).send()
    assert stage.run().outcomes() == ["alerted"]


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_what_is_no_exception_is_dead_lettered_as_stock_has_it_and_the_thread_lives(error):
    stage = Stage()
    always(stage, error, max_retries=0, retry_on=Exception).send()
    assert stage.run().outcomes() == ["dead"]


def test_counters_that_another_middleware_overwrites_are_begun_anew():
    stage = Stage()

    class Meddling(Middleware):
        def before_process_message(self, broker, message):
            message.options["policies"] = "mine"

    stage.broker.add_middleware(Meddling())
    failing(stage, PaymentError(), retry_on={PaymentError: SOON}).send()
    assert stage.run().outcomes() == ["retried", "succeeded"]


def test_a_worker_whose_broker_refuses_it_for_good_ends_as_the_command_does_for_one_that_is_not_there():
    stage = Stage()
    state = stage.classifier.attached_to
    for state.fatal, state.in_command in ((None, True), (ConnectionError("NOAUTH"), False)):
        stage.classifier.after_worker_shutdown(stage.broker, None)
    state.fatal, state.in_command = ConnectionError("NOAUTH"), True
    with pytest.raises(SystemExit) as ended:
        stage.classifier.after_worker_shutdown(stage.broker, None)
    assert ended.value.code == 3
