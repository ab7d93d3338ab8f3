"""Seconds where milliseconds are meant: a warning at the declaration."""

from __future__ import annotations

import logging
from datetime import timedelta

import pytest
from dramatiq.errors import Retry
from dramatiq.results import Results
from dramatiq.results.backends import StubBackend

from dramatiq_policies import (
    ErrorClassifier,
    Heartbeat,
    Idempotency,
    QueueMonitor,
    RetryPolicy,
    Snooze,
    Threshold,
    Timeout,
    constant,
    exponential,
    polynomial,
    retry_after,
)
from dramatiq_policies.common import durations
from dramatiq_policies.common.throttle import Throttle
from dramatiq_policies.testing import drain

from ..support import Stage


@pytest.fixture(autouse=True)
def nothing_warned_of_before(monkeypatch):
    monkeypatch.setattr(durations, "_warned", Throttle())


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if "milliseconds" in r.getMessage()]


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": 30},
        {"timeout": 0.5},
        {"time_limit": 60},
        {"queue_timeout": 3_600},
        {"idempotent": True, "idempotency_ttl": 86_400},
        {"max_age": 3_600},
        {"min_backoff": 15},
        {"max_backoff": 600},
        {"result_ttl": 3_600},
    ],
)
def test_an_actors_option_that_looks_like_seconds_is_a_warning_that_names_it(options, caplog):
    stage = Stage(middleware=[Results(backend=StubBackend())], bundle={"idempotency": Idempotency()})
    stage.actor(lambda: None, actor_name="pay", **options)
    option, value = next((name, value) for name, value in options.items() if name != "idempotent")
    (warning,) = warnings(caplog)
    assert warning.startswith(f"actor 'pay': {option}={value} is {value} milliseconds.")
    assert f"timedelta(seconds={value})" in warning
    assert caplog.records[-1].levelno == logging.WARNING


@pytest.mark.parametrize("declared", [60, timedelta(milliseconds=60)])
@pytest.mark.parametrize("option", ["max_age", "min_backoff", "max_backoff", "result_ttl"])
def test_dramatiq_s_own_middleware_finds_a_plain_int(option, declared):
    # Results gives its ttl to Redis, and hiredis refuses a subclass of int.
    stage = Stage(middleware=[Results(backend=StubBackend())])
    actor = stage.actor(lambda: None, actor_name="pay", **{option: declared})
    assert (actor.options[option], type(actor.options[option])) == (60, int)


@pytest.mark.parametrize(
    ("declare", "count"),
    [
        (lambda: exponential(initial=2, maximum=60), 2),
        (lambda: constant(5), 1),
        (lambda: polynomial(scale=1, offset=2), 2),
        (lambda: retry_after(fallback=10, maximum=600), 2),
        (lambda: RetryPolicy(wait=30), 1),
        (lambda: RetryPolicy(max_elapsed=3_600), 1),
        (lambda: Timeout(default=30, queue_default=3_600), 2),
        (lambda: ErrorClassifier(alert_interval=300, max_snooze=3_600), 2),
        (lambda: Idempotency(ttl=86_400), 1),
        (lambda: Timeout(grace=5), 1),
        (lambda: Heartbeat(interval=10, silence=60), 2),
        (lambda: QueueMonitor(interval=15), 1),
        (lambda: Threshold(oldest=300, stalled=60), 2),
    ],
)
def test_an_argument_that_looks_like_seconds_is_doubted(declare, count, caplog):
    declare()
    assert len(warnings(caplog)) == count


def test_a_timedelta_a_none_or_a_plausible_number_is_taken_as_declared(caplog):
    constant(0)
    constant(timedelta(milliseconds=5))
    exponential(initial=timedelta(milliseconds=20), maximum=timedelta(seconds=1))
    exponential(initial=1_000, maximum=60_000)
    ErrorClassifier(alert_interval=0)
    stage = Stage()
    stage.actor(
        lambda: None,
        actor_name="pay",
        timeout=30_000,
        queue_timeout=3_600_000,
        idempotent=True,
        idempotency_ttl=timedelta(seconds=5),
    )
    assert warnings(caplog) == []


@pytest.mark.parametrize("option", ["timeout", "time_limit", "max_age", "min_backoff", "max_backoff", "result_ttl"])
def test_an_option_of_a_message_that_looks_like_seconds_is_doubted_once_per_actor(option, caplog):
    stage = Stage(middleware=[Results(backend=StubBackend())])
    pay = stage.actor(lambda: None, actor_name="pay")
    pay.send_with_options(**{option: 30})
    pay.send_with_options(**{option: 30})
    pay.send_with_options(**{option: timedelta(milliseconds=30)})
    (warning,) = warnings(caplog)
    assert warning.startswith(
        f"A message for actor 'pay': {option}=30 is 30 milliseconds. For seconds write timedelta("
    )


@pytest.mark.parametrize("option", ["timeout", "max_backoff"])
def test_a_timedelta_of_a_message_is_taken_as_sent(option, caplog):
    stage = Stage()
    stage.actor(lambda: None, actor_name="pay").send_with_options(**{option: timedelta(milliseconds=30)})
    assert warnings(caplog) == []


@pytest.mark.parametrize("verdict", [Snooze, lambda delay: Retry(delay=delay)], ids=["Snooze", "Retry"])
def test_a_delay_of_a_snooze_or_a_retry_that_looks_like_seconds_is_doubted_once_per_actor(verdict, caplog):
    stage = Stage()

    def wait_for_the_bank(delays=[60, 60]):  # noqa: B006 - the runs share the list
        if delays:
            raise verdict(delays.pop())

    stage.actor(wait_for_the_bank).send()
    drain(stage.broker)
    (warning,) = warnings(caplog)
    assert warning.startswith("actor 'wait_for_the_bank': ")
    assert "delay=60 is 60 milliseconds. For seconds write timedelta(seconds=60)" in warning


def test_a_snooze_of_a_timedelta_is_taken_as_raised(caplog):
    stage = Stage()

    def wait_for_the_bank(delays=[timedelta(milliseconds=60)]):  # noqa: B006 - the runs share the list
        if delays:
            raise Snooze(delays.pop())

    stage.actor(wait_for_the_bank).send()
    drain(stage.broker)
    assert (stage.outcomes(), warnings(caplog)) == (["deferred", "succeeded"], [])


@pytest.mark.parametrize(
    ("answer", "count"), [(lambda attempt: 2**attempt, 1), (lambda attempt: timedelta(milliseconds=2**attempt), 0)]
)
def test_an_answer_of_a_custom_wait_that_looks_like_seconds_is_doubted_once_per_wait(answer, count, caplog):
    stage = Stage(unclassified=RetryPolicy(attempts=4, wait=lambda attempt, error: answer(attempt)))
    stage.actor(lambda: 1 / 0, actor_name="pay").send()
    drain(stage.broker)
    assert len(warnings(caplog)) == count


def test_the_jitter_of_a_declared_wait_is_no_answer_of_yours(caplog):
    stage = Stage(unclassified=RetryPolicy(attempts=3, wait=exponential(initial=timedelta(milliseconds=20))))
    stage.actor(lambda: 1 / 0, actor_name="pay").send()
    drain(stage.broker)
    assert warnings(caplog) == []
