"""The log lines of outcomes: levels, fields, stacks."""

from __future__ import annotations

import logging
import traceback
from datetime import timedelta

import pytest
from dramatiq.middleware import (
    Middleware,
    SkipMessage,
)

from dramatiq_policies import (
    DiscardLogger,
    QueueTimeoutExceeded,
    Snooze,
    when,
)

from ..support import Stage
from .scenarios import (
    SOON,
    CardDeclined,
    MissingKey,
    PaymentError,
    always,
    failing,
    lines,
    outcomes_of,
    raw,
)

SECRET = "4111-1111"


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
        f"{PaymentError.__module__}.PaymentError",
        "no",
    ]
    assert record.tags == {"team": "billing"}
    assert record.rule == f"{PaymentError.__module__}.PaymentError"


def skip(middleware, broker, message):
    raise SkipMessage


def test_a_requeued_or_skipped_message_is_a_line_at_info(caplog):
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
