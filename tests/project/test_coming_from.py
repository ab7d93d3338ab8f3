"""docs/coming-from.md: each name in the columns "here" exists, and the tables count attempts as the code does."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import dramatiq
import pytest
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import CurrentMessage

import dramatiq_policies
from dramatiq_policies import ErrorClassifier, RetryPolicy, Timeout, install, polynomial
from dramatiq_policies.testing import drain

PAGE = (Path(__file__).parents[2] / "docs" / "coming-from.md").read_text()
ROWS = re.findall(r"^\| (?!there|---)(.*?) \| (.*?) \| (.*?) ?\|$", PAGE, re.MULTILINE)


class Slow(Exception):
    pass


class Down(Exception):
    pass


@pytest.fixture
def broker():
    broker = install(StubBroker())
    yield broker
    broker.close()


def test_each_option_in_the_tables_exists(broker):
    known = broker.actor_options | {"queue_name", "priority", "delay", "args"}
    for what in (RetryPolicy, ErrorClassifier, Timeout, dramatiq_policies.exponential, dramatiq.errors.Retry):
        known |= set(inspect.signature(what).parameters)
    code = [part for _, here, _ in ROWS for part in re.findall(r"`([^`]+)`", here)]
    assert len(code) > 40
    assert [name for part in code for name in re.findall(r"\b(\w+)=", part) if name not in known] == []


def test_each_class_and_function_in_the_tables_exists():
    code = " ".join(part for _, here, _ in ROWS for part in re.findall(r"`([^`]+)`", here))
    called = set(re.findall(r"(?<![\w.])([A-Z]\w+|exponential|polynomial|current_job|drain)\(", code))
    assert len(called) >= 7
    here = {**vars(dramatiq_policies), "drain": drain, "Retry": dramatiq.errors.Retry}
    assert called - set(here) == set()


@pytest.mark.parametrize("policy", [{"max_retries": 4, "min_backoff": 10, "max_backoff": 20}, {"retry_on": {Slow: 5}}])
def test_four_retries_there_are_five_attempts_here(broker, policy):
    @dramatiq.actor(broker=broker, **policy)
    def job():
        raise Slow

    job.send()
    assert len(drain(broker).outcomes(job)) == 5


def test_a_tuple_of_errors_has_one_counter(broker):
    runs = []

    @dramatiq.actor(broker=broker, retry_on={(Slow, Down): 3})
    def job():
        runs.append(1)
        raise (Slow if len(runs) % 2 else Down)

    job.send()
    assert drain(broker).outcomes(job) == ["retried", "retried", "dead"]


def test_sidekiq_s_retry_of_five_without_a_morgue():
    broker = install(
        StubBroker(), error_classifier=ErrorClassifier(unclassified=RetryPolicy(attempts=6, then="discard"))
    )

    @dramatiq.actor(broker=broker)
    def job():
        raise Slow

    job.send()
    run = drain(broker)
    assert run.outcomes(job) == ["retried"] * 5 + ["discarded"]
    assert run.dead == []


def test_the_waits_of_polynomially_longer():
    assert [polynomial(jitter=0)(attempt, Slow()) for attempt in (1, 2, 3)] == [3_000, 18_000, 83_000]


@pytest.mark.parametrize(("limit", "outcome"), [("max_age", "skipped"), ("queue_timeout", "succeeded")])
def test_a_delay_counts_for_max_age_and_not_for_queue_timeout(broker, limit, outcome):
    @dramatiq.actor(broker=broker, **{limit: 1_000})
    def job(): ...

    job.send_with_options(delay=5_000)
    assert drain(broker).outcomes(job) == [outcome]


def test_current_message_works_as_before(broker):
    broker.add_middleware(CurrentMessage())
    seen = []

    @dramatiq.actor(broker=broker)
    def job():
        seen.append(CurrentMessage.get_current_message().actor_name)

    job.send()
    drain(broker)
    assert seen == ["job"]
