"""`drain` does as a worker does: generated scenarios, run by both, end alike."""

from __future__ import annotations

import functools
import itertools
from collections import Counter, defaultdict

import dramatiq
import pytest
from dramatiq.brokers.stub import StubBroker
from dramatiq.rate_limits.backends import StubBackend as StubLimits
from dramatiq.results import ResultFailure, ResultMissing, Results
from dramatiq.results.backends import StubBackend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dramatiq_policies import Discard, ErrorClassifier, Idempotency, RetryPolicy, Snooze, constant, current_job, install
from dramatiq_policies.middleware.composition import GroupCallbacks
from dramatiq_policies.testing import drain

from ..support import Collector, is_busy

SCENARIOS = 300
numbers = itertools.count()


class Flaky(Exception):
    pass


class Broken(Exception):
    pass


class Locked(Exception):
    pass


class Missing(Exception):
    pass


ERRORS = {
    "flaky": Flaky,
    "broken": Broken,
    "locked": Locked,
    "missing": Missing,
    "unclassified": ValueError,
    "discard": lambda: Discard("no use"),
    "snooze": lambda: Snooze(1),
}
RULES = {
    "retry_on": {Flaky: RetryPolicy(attempts=3, wait=constant(1)), Locked: RetryPolicy(2, constant(0), then="discard")},
    "discard_on": Broken,
    "alert_on": Missing,
    "max_retries": 2,
    "min_backoff": 1,
    "max_backoff": 1,
    "store_results": True,
}


class Stage:
    """A broker with some actors whose jobs do what their message's plan says, attempt by attempt."""

    def __init__(self):
        self.collected = Collector()
        self.results = StubBackend()
        self.results.results = {}
        self.broker = StubBroker()
        self.broker.add_middleware(Results(backend=self.results))
        self.broker.add_middleware(GroupCallbacks(StubLimits()))
        install(
            self.broker,
            error_classifier=ErrorClassifier(on_outcome=self.collected, alert_interval=0, dead_letter_discards=False),
            idempotency=Idempotency(lease=400),
        )
        self.plans, self.left, self.first_ids = {}, {}, {}
        self.runs = Counter()
        actor = functools.partial(dramatiq.actor, broker=self.broker, **RULES)
        self.actors = {
            "plain": actor(self.work, actor_name="plain", queue_name="one"),
            "kept": actor(self.work, actor_name="kept", queue_name="two", dead_letter_discards=True),
            "once": actor(self.work, actor_name="once", queue_name="one", idempotency_key="{name}"),
        }

    def work(self, name, before=None):
        self.runs[name] += 1
        # Twins share a name, not a plan: which of them runs first is a matter of moments.
        plan = self.left.setdefault(current_job().message_id, list(self.plans[name]))
        step = plan.pop(0) if plan else "succeed"
        if step != "succeed":
            make = ERRORS[step]
            raise make()
        return f"{name} after {before}"

    def send(self, scenario):
        """Send it, and return its messages by their names."""
        self.collected.events.clear()
        self.runs.clear()
        self.plans.clear()
        self.first_ids.clear()
        for letters in self.broker.dead_letters_by_queue.values():
            letters.clear()
        sent = []
        for number, (kind, actor, plan, more) in enumerate(scenario):
            name = f"{next(numbers)}-{number}"
            self.plans[name] = list(plan)
            message = self.actors[actor].message(name)
            if kind == "delayed":
                self.broker.enqueue(message, delay=1 + more)
                sent.append(message)
            elif kind == "twice":
                sent += [message, self.actors[actor].message(name)]
                self.first_ids[sent[-1].message_id] = message.message_id
                for one in sent[-2:]:
                    self.broker.enqueue(one)
            elif kind == "pipeline":
                names = [name, f"{name}+", f"{name}++"][: 2 + more % 2]
                self.plans |= {one: self.plans.get(one, []) for one in names}
                pipe = dramatiq.pipeline([self.actors[actor].message(one) for one in names], broker=self.broker)
                pipe.run()
                sent += pipe.messages
            elif kind == "group":
                names = [name, f"{name}+"]
                self.plans |= {one: self.plans.get(one, []) for one in [*names, f"{name}!"]}
                members = [self.actors[actor].message(one) for one in names]
                group = dramatiq.group(members, broker=self.broker)
                callback = self.actors["plain"].message(f"{name}!")
                group.add_completion_callback(callback)
                group.run()
                sent += [*members, callback]
            else:
                self.broker.enqueue(message)
                sent.append(message)
        return sent

    def ends(self, sent):
        """How it ended, in terms that do not depend on ids and on when exactly something ran."""
        names = {message.message_id: index for index, message in enumerate(sent)}
        outcomes = defaultdict(list)
        for event in self.collected.events:
            if event.outcome != "deferred" or event.reason == "snoozed":
                # Before Dramatiq 2.2 messages of one priority run in any order, duplicates too.
                first = self.first_ids.get(event.message_id, event.message_id)
                outcomes[names[first]].append((event.outcome.value, str(event.reason), event.attempt))
        dead = [
            letter.options["failure"] for letters in self.broker.dead_letters_by_queue.values() for letter in letters
        ]
        return {
            "outcomes": {name: sorted(ends) for name, ends in outcomes.items()},
            "runs": sorted(self.runs.values()),
            "dead": sorted((f["outcome"], str(f["reason"]), f["attempts"], len(f["history"])) for f in dead),
            "results": [self.result(message) for message in sent],
        }

    def result(self, message):
        try:
            return message.get_result(backend=self.results) is not None
        except (ResultFailure, ResultMissing) as error:
            return str(error) if isinstance(error, ResultFailure) else "missing"


@pytest.fixture(scope="module")
def real():
    stage = Stage()
    worker = dramatiq.Worker(stage.broker, worker_timeout=2, worker_threads=1)
    worker.start()
    yield stage
    worker.stop()


@pytest.fixture(scope="module")
def kit():
    return Stage()


def settled(stage):
    while is_busy(stage.broker):
        for name in ("one", "two"):
            stage.broker.join(name, timeout=20_000, fail_fast=False)


step = st.sampled_from([*ERRORS, "succeed"])
message = st.tuples(
    st.sampled_from(["plain", "delayed", "twice", "pipeline", "group"]),
    st.sampled_from(["plain", "kept", "once"]),
    st.lists(step, max_size=4),
    st.integers(0, 3),
)


@settings(
    max_examples=SCENARIOS, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(scenario=st.lists(message, min_size=1, max_size=4))
def test_scenarios_end_alike_in_a_drain_and_under_a_real_worker(real, kit, scenario):
    sent = real.send(scenario)
    settled(real)
    expected = real.ends(sent)
    sent = kit.send(scenario)
    run = drain(kit.broker)
    assert kit.ends(sent) == expected
    assert [event.outcome for event in run.events] == [event.outcome for event in kit.collected.events]
