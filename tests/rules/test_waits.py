"""Waits are clamped in one place, wherever they come from, and a wait that is changed is said."""

from __future__ import annotations

import logging
import math
from datetime import timedelta

import pytest
from dramatiq.errors import Retry

from dramatiq_policies import ConfigurationError, RetryPolicy, Snooze, constant, exponential, polynomial, retry_after
from dramatiq_policies.common.durations import WEEK_MS, clamped_wait

from ..support import Stage

HOUR = 3_600_000


def first_event(error, **declared):
    stage, runs = Stage(), []

    @stage.actor(**{"min_backoff": 11, "max_backoff": 22, **declared})
    def job():
        runs.append(1)
        if len(runs) == 1:
            raise error

    job.send()
    with stage.working():
        stage.collected.wait_for(lambda events: events)
    return stage.events[0]


@pytest.mark.parametrize(
    "declared", [{}, {"retry_on": {Retry: RetryPolicy(attempts=5, wait=33)}}], ids=["stock", "rule"]
)
@pytest.mark.parametrize(
    ("delay", "waited"),
    [
        (HOUR, HOUR),
        (1_500.4, 1_500),
        (timedelta(hours=1), HOUR),
        (timedelta(milliseconds=1.4), 1),
        (-5, 0),
        (timedelta(seconds=-5), 0),
        (-math.inf, 0),
        (math.inf, WEEK_MS),
        (WEEK_MS, WEEK_MS),
        (WEEK_MS + 1, WEEK_MS),
        (10**400, WEEK_MS),
        (timedelta.max, WEEK_MS),
    ],
    ids=repr,
)
def test_the_delay_of_retry_is_honoured_from_nothing_to_seven_days(delay, waited, declared, caplog):
    event = first_event(Retry(delay=delay), **declared)
    assert (event.outcome, event.delay_ms) == ("retried", waited)
    said = [record for record in caplog.records if record.name == "dramatiq_policies.backoff"]
    assert bool(said) == (waited in (0, WEEK_MS) and delay != WEEK_MS)


@pytest.mark.parametrize("delay", [math.nan, "soon", "5", True, []], ids=repr)
def test_a_delay_of_retry_that_is_no_duration_is_logged_and_the_wait_without_it_taken(delay, caplog):
    assert 11 <= first_event(Retry(delay=delay)).delay_ms <= 22
    assert first_event(Retry(delay=delay), retry_on={Retry: RetryPolicy(wait=33)}).delay_ms == 33
    assert sum("delay of the Retry" in record.getMessage() for record in caplog.records) == 2


@pytest.mark.parametrize("delay", [timedelta(days=8), 10**12, timedelta.max], ids=repr)
def test_a_longer_snooze_than_dramatiq_can_wait_is_shortened_and_logged(delay, caplog):
    event = first_event(Snooze(delay))
    assert (event.outcome, event.delay_ms) == ("deferred", WEEK_MS)
    assert "exceeds 7 days" in caplog.text


def test_a_longer_wait_of_a_callable_than_dramatiq_can_wait_is_shortened_and_logged(caplog):
    event = first_event(OSError(), retry_on={OSError: RetryPolicy(wait=lambda attempt, error: timedelta(days=9))})
    assert event.delay_ms == WEEK_MS
    assert "exceeds 7 days" in caplog.text


@pytest.mark.parametrize(
    "declare",
    [
        lambda: constant(timedelta(days=8)),
        lambda: RetryPolicy(wait=timedelta(days=8)),
        lambda: exponential(initial=WEEK_MS + 1),
        lambda: exponential(maximum=timedelta(days=30)),
        lambda: polynomial(offset=WEEK_MS + 1),
        lambda: retry_after(maximum=timedelta(days=30)),
        lambda: Stage().actor(lambda: None, actor_name="job", max_backoff=timedelta(days=30)),
        lambda: Stage(min_backoff=WEEK_MS + 1),
    ],
)
def test_a_declared_wait_that_is_longer_than_dramatiq_can_wait_is_logged_when_it_is_declared(declare, caplog):
    caplog.set_level(logging.WARNING)
    declare()
    assert "exceeds 7 days" in caplog.text


def test_a_wait_of_up_to_seven_days_is_not_logged(caplog):
    constant(WEEK_MS)
    exponential(maximum=timedelta(days=7))
    assert clamped_wait(WEEK_MS, "This wait") == WEEK_MS
    assert not caplog.records


@pytest.mark.parametrize("delay", [math.nan, math.inf, -math.inf, True], ids=repr)
def test_a_message_is_not_sent_with_a_delay_that_is_no_duration(delay):
    stage = Stage()
    job = stage.actor(lambda: None, actor_name="job")
    with pytest.raises(ConfigurationError, match=r"actor 'job': delay: expected milliseconds or a timedelta, got"):
        job.send_with_options(delay=delay)
    assert not stage.broker.queues["default"].qsize()
    assert not stage.broker.queues["default.DQ"].qsize()


def test_a_message_is_sent_with_a_timedelta_for_a_delay():
    stage = Stage()
    job = stage.actor(lambda: None, actor_name="job")
    job.send_with_options(delay=timedelta(milliseconds=3))
    assert stage.run().outcomes() == ["succeeded"]


class ReadOnly(Retry):
    @property
    def delay(self):
        return timedelta(milliseconds=44)

    @delay.setter
    def delay(self, value):
        pass


class Unreadable(Snooze):
    def __init__(self):
        Exception.__init__(self, "the bank is closed")


@pytest.mark.parametrize("declared", [{}, {"retry_on": {Retry: RetryPolicy(wait=33)}}], ids=["stock", "rule"])
def test_the_delay_of_a_retry_that_can_not_be_set_is_honoured(declared):
    event = first_event(ReadOnly("later"), **declared)
    assert (event.outcome, event.delay_ms, type(event.exception)) == ("retried", 44, ReadOnly)


def test_a_snooze_without_a_delay_waits_a_while_and_logged(caplog):
    event = first_event(Unreadable())
    assert (event.outcome, event.delay_ms) == ("deferred", 15_000)
    assert "The delay of the Snooze in message" in caplog.text


def test_a_backoff_of_a_message_that_is_longer_than_dramatiq_can_wait_is_logged(caplog):
    stage, runs = Stage(), []

    @stage.actor(actor_name=f"job {id(caplog)}")
    def job():
        runs.append(1)
        raise OSError

    job.send_with_options(min_backoff=timedelta(days=30), max_backoff=timedelta(days=60))
    with stage.working():
        stage.collected.wait_for(lambda events: events)
    assert stage.events[0].delay_ms <= WEEK_MS
    assert caplog.text.count("exceeds 7 days: the wait is 7 days") == 2
