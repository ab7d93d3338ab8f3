"""A job's verdict inside an exception group, as `asyncio.TaskGroup` raises it, is a verdict."""

from __future__ import annotations

import builtins

import pytest
from dramatiq.errors import RateLimitExceeded, Retry
from dramatiq.middleware import Shutdown

from dramatiq_policies import Discard, RetryPolicy, Snooze, TimeoutExceeded

from ..support import Stage

if hasattr(builtins, "BaseExceptionGroup"):
    Group = builtins.BaseExceptionGroup
else:
    Group = pytest.importorskip("exceptiongroup").BaseExceptionGroup

RULES = {"alert_on": PermissionError, "discard_on": LookupError, "retry_on": {OSError: RetryPolicy(attempts=3, wait=7)}}


def group(*errors):
    return Group("several", errors)


def ended(*errors, stock=None, **declared):
    """The events of a job that raises these errors in a group, once."""
    stage, runs = Stage(), []

    @stage.actor(**{"min_backoff": 1, "max_backoff": 2, **(stock or {}), **declared})
    def job():
        runs.append(1)
        if len(runs) == 1:
            raise group(*errors)

    job.send()
    return stage.run().events


def test_discard_in_a_group_discards_also_where_it_is_nested_and_beside_errors_that_no_rule_names():
    for errors in ([Discard("a")], [group(group(Discard("a")))], [KeyError("x"), Discard("a"), ValueError()]):
        (event,) = ended(*errors)
        assert event.outcome == "discarded"
        assert isinstance(event.exception, Group)


def test_snooze_in_a_group_snoozes_and_uses_no_attempt():
    first, second = ended(Snooze(5, "closed"), group(Snooze(9)))
    assert (first.outcome, first.reason, first.delay_ms) == ("deferred", "snoozed", 9)
    assert (second.outcome, second.attempt) == ("succeeded", 1)


def test_retry_in_a_group_waits_for_its_delay_and_of_several_for_the_longest():
    first, second = ended(Retry(delay=4), group(Retry(delay=11)), Retry())
    assert (first.outcome, first.delay_ms, second.attempt) == ("retried", 11, 2)


def test_retry_in_a_group_is_bounded_by_max_retries():
    (event,) = ended(Retry(delay=4), stock={"max_retries": 0})
    assert (event.outcome, event.reason) == ("dead", "unclassified")


def test_a_rate_limit_in_a_group_is_left_to_the_stock_options_as_it_is_alone():
    stage = Stage(unclassified=RetryPolicy(attempts=1))
    runs = []

    @stage.actor(min_backoff=1, max_backoff=2)
    def job():
        runs.append(1)
        if len(runs) == 1:
            raise group(RateLimitExceeded("later"))

    job.send()
    assert stage.run().outcomes() == ["retried", "succeeded"]


@pytest.mark.parametrize(
    ("errors", "outcome"),
    [
        ([Discard("no"), PermissionError()], "alerted"),
        ([Snooze(5), PermissionError()], "alerted"),
        ([Shutdown(), PermissionError()], "alerted"),
        ([Snooze(5), LookupError()], "discarded"),
        ([Discard("no"), OSError(), Snooze(5), Retry(delay=5)], "discarded"),
        ([Shutdown(), Discard("no")], "discarded"),
        ([Shutdown(), OSError(), Snooze(5)], "interrupted"),
        ([Snooze(5), OSError()], "retried"),
        ([Retry(delay=5_000), OSError()], "retried"),
        ([Snooze(5), Retry(delay=3)], "retried"),
        ([Snooze(5), KeyboardInterrupt()], "deferred"),
    ],
    ids=str,
)
def test_the_gravest_of_several_leaves_decides(errors, outcome):
    assert ended(*errors, **RULES)[0].outcome == outcome


def test_the_wait_of_a_rule_is_given_the_leaf_that_the_rule_names():
    given = []

    def wait(attempt, error):
        given.append(error)
        return 3

    refused = ConnectionRefusedError()
    ended(KeyError(), refused, retry_on={OSError: RetryPolicy(wait=wait)})
    assert given == [refused]


def test_a_timeout_in_a_group_goes_by_the_rule_that_names_it():
    (event,) = ended(TimeoutExceeded("late"), discard_on=TimeoutExceeded)
    assert event.outcome == "discarded"


def test_a_shutdown_in_a_group_puts_the_message_back_at_once_and_uses_no_attempt():
    first, second = ended(Shutdown(), KeyError("x"))
    assert (first.outcome, second.outcome, second.attempt) == ("interrupted", "succeeded", 1)
