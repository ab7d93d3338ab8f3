"""Seconds where milliseconds are meant: a warning at the declaration."""

from __future__ import annotations

import logging
from datetime import timedelta

import pytest

from dramatiq_policies import (
    ErrorClassifier,
    Idempotency,
    RetryPolicy,
    Timeout,
    constant,
    exponential,
    polynomial,
    retry_after,
)

from ..support import Stage


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
    ],
)
def test_an_actors_option_that_looks_like_seconds_is_a_warning_that_names_it(options, caplog):
    stage = Stage(bundle={"idempotency": Idempotency()})
    stage.actor(lambda: None, actor_name="pay", **options)
    option, value = next((name, value) for name, value in options.items() if name != "idempotent")
    (warning,) = warnings(caplog)
    assert warning.startswith(f"actor 'pay': {option}={value} is {value} milliseconds.")
    assert f"timedelta(seconds={value})" in warning
    assert caplog.records[-1].levelno == logging.WARNING


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
    ],
)
def test_so_is_an_argument_of_a_wait_a_policy_or_a_middleware(declare, count, caplog):
    declare()
    assert len(warnings(caplog)) == count


def test_a_timedelta_nothing_and_what_is_plausible_is_taken_as_declared(caplog):
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
