"""The order of a broker's middleware, in which no user needs to know his way about: it changes nothing."""

from __future__ import annotations

import gc
import random
import sys
from contextlib import contextmanager

import dramatiq
import pytest
from dramatiq import Worker, group, pipeline
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import (
    AgeLimit,
    AsyncIO,
    Callbacks,
    CurrentMessage,
    GroupCallbacks,
    Middleware,
    Pipelines,
    Retries,
    ShutdownNotifications,
    SkipMessage,
    TimeLimit,
)
from dramatiq.rate_limits.backends import StubBackend as Counters
from dramatiq.results import ResultFailure, ResultMissing, Results
from dramatiq.results.backends import StubBackend

from dramatiq_policies import (
    DiscardLogger,
    ErrorClassifier,
    Idempotency,
    RetryPolicy,
    Timeout,
    constant,
    current_job,
    install,
)
from dramatiq_policies.testing import drain


class Judge(Middleware):
    """A user's own: leaves messages out, and fails some after they have run."""

    def before_process_message(self, broker, message):
        if message.args[:1] == ("left out",):
            raise SkipMessage
        if message.args[:1] == ("refused",):
            message.fail()
            raise SkipMessage

    def after_process_message(self, broker, message, *, result=None, exception=None):
        if message.args[:1] == ("condemned",):
            message.fail()


KINDS = {
    "AgeLimit": AgeLimit,
    "AsyncIO": AsyncIO,
    "Callbacks": Callbacks,
    "CurrentMessage": CurrentMessage,
    "DiscardLogger": DiscardLogger,
    "ErrorClassifier": lambda: ErrorClassifier(retry_on={ConnectionError: RetryPolicy(3, wait=constant(1_000))}),
    "GroupCallbacks": lambda: GroupCallbacks(Counters()),
    "Idempotency": Idempotency,
    "Judge": Judge,
    "Pipelines": Pipelines,
    "Results": lambda: Results(backend=StubBackend()),
    "Retries": Retries,
    "ShutdownNotifications": ShutdownNotifications,
    "TimeLimit": TimeLimit,
    "Timeout": Timeout,
}


def what_happens(order):
    """Everything that can be seen of a day in which everything happens once, with the middleware in this order."""
    broker = StubBroker(middleware=[KINDS[name]() for name in order])
    seen = []
    results = next(one for one in broker.middleware if type(one) is Results)

    def done(*args, **kwargs):
        seen.append(("done_when", CurrentMessage.get_current_message() is not None))
        return args[0] == "done before"

    @dramatiq.actor(
        broker=broker,
        store_results=True,
        discard_on=KeyError,
        on_success="told",
        on_failure="told",
        idempotency_key="{what}",
        done_when=done,
        max_age=60_000,
    )
    def job(what, *before):
        seen.append((what, before, current_job().attempt, CurrentMessage.get_current_message() is not None))
        if what == "flaky" and current_job().attempt < 3:
            raise ConnectionError
        if what == "bad":
            raise KeyError(what)
        if what == "hopeless":
            raise ConnectionError
        return what

    @dramatiq.actor(broker=broker)
    def told(message, about):
        seen.append(("told", message["args"][0], about))

    @dramatiq.actor(broker=broker)
    def complete(*args):
        seen.append(("complete", args))

    @dramatiq.actor(broker=broker, max_retries=1, min_backoff=10, timeout=60_000)
    async def waits(what):
        seen.append((what, "async", current_job().attempt))
        if current_job().attempt == 1:
            raise ZeroDivisionError

    waits.send("awaited")
    sent = {}
    for what in ("well", "flaky", "bad", "hopeless", "left out", "refused", "condemned", "done before"):
        sent[what] = job.send(what)
    for what in ("well", "flaky", "bad", "left out", "refused", "condemned"):
        piped = pipeline(
            [job.message_with_options(args=(what,), idempotency_key=f"piped {what}"), complete.message()], broker=broker
        )
        piped.run()
        sent[f"piped {what}"] = piped.messages[0]
    sent["duplicate"] = job.send("well")
    old = job.message("old").copy(message_timestamp=1)
    sent["old"] = broker.enqueue(old)
    whole = group([job.message(f"member {n}") for n in range(2)], broker=broker)
    whole.add_completion_callback(complete.message("whole"))
    whole.run()
    partly = group([job.message("member 2"), job.message("bad")], broker=broker)
    partly.add_completion_callback(complete.message("partly"))
    partly.run()
    run = drain(broker)
    ends = {}
    for what, message in sent.items():
        try:
            ends[what] = message.get_result(backend=results.backend)
        except ResultMissing:
            ends[what] = "nothing"
        except ResultFailure as failure:
            ends[what] = str(failure)
    broker.close()
    return {
        "seen": sorted(map(repr, seen)),
        "outcomes": sorted((event.actor, event.outcome, event.reason, event.attempt) for event in run.events),
        "dead": sorted(str(letter.args) for letter in run.dead),
        "results": ends,
    }


@pytest.mark.parametrize("seed", range(12))
def test_no_order_of_middleware_changes_an_outcome(seed):
    names = sorted(KINDS)
    as_listed = what_happens(names)
    kinds = {outcome.value for _, outcome, _, _ in as_listed["outcomes"]}
    assert kinds == {"succeeded", "retried", "discarded", "dead", "duplicate", "skipped"}
    random.Random(seed).shuffle(names)
    assert what_happens(names) == as_listed
    # Whatever stood before another has stood behind it, too.
    assert what_happens(names[::-1]) == as_listed


@contextmanager
def a_worker_of(broker):
    worker = Worker(broker, worker_timeout=20, worker_threads=1)
    worker.start()
    yield
    worker.stop()


def test_a_custom_stock_middleware_that_works_against_ours_is_logged_when_a_worker_boots(caplog):
    class Again(Retries):
        pass

    class Slow(TimeLimit):
        pass

    broker = StubBroker(middleware=[Again(), Slow(), ErrorClassifier(), Timeout()])
    with a_worker_of(broker):
        said = [record.getMessage() for record in caplog.records]
    assert said == [
        "Again (a Retries) conflicts with ErrorClassifier: both retry each message. Remove Again from the broker.",
        "Slow (a TimeLimit) conflicts with Timeout: both interrupt each job. Remove Slow from the broker.",
    ]


def test_where_there_is_none_nothing_is_logged(caplog):
    with a_worker_of(StubBroker(middleware=[Retries(), TimeLimit(), ErrorClassifier(), Timeout()])):
        assert caplog.records == []


def test_no_middleware_gets_a_dict_that_makes_each_look_up_of_a_hook_slower():
    broker = StubBroker()
    install(broker)
    # From CPython 3.11 on, an object makes its dict at the first use of vars(), and looks up attributes more slowly from then on.
    made = [
        any(one is vars(middleware) for one in referents) for middleware, referents in referents_of(broker.middleware)
    ]
    assert any(made) == (sys.version_info < (3, 11))


def referents_of(objects):
    return [(one, gc.get_referents(one)) for one in objects]
