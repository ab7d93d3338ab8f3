"""Completions posted for the next claim to carry; with real servers in tests/integration/test_batched_completion.py."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from dramatiq import Middleware
from dramatiq.brokers.stub import StubBroker
from dramatiq.errors import ConnectionClosed

from dramatiq_policies import Idempotency, install
from dramatiq_policies.delivery.broker_state import state_of
from dramatiq_policies.idempotency import batched_completion as batched_completions
from dramatiq_policies.idempotency.batched_completion import BatchedCompletions
from dramatiq_policies.stores.memory import MemoryStore

from ..support import Stage

MESSAGE = SimpleNamespace(message_id="m")


class Trips:
    """Keeps what is posted until a call carries it."""

    def __init__(self):
        self.posted = []
        self.calls = 0

    def post(self, post):
        self.posted.append(post)

    def execute(self, calls, *, carries):
        assert (calls, carries) == ((), True)
        self.calls += 1
        self.posted.clear()


class Stopping:
    """An event that is never set, and remembers for how long it was waited for."""

    def __init__(self):
        self.waits = []

    def wait(self, seconds):
        self.waits.append(seconds)


class Transport:
    """Acknowledges after as many errors as it is given."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.settled = 0

    def completion_command(self, delivery):
        return ("SET", "key", "done"), True

    def acked_by_completion(self, delivery, reply):
        delivery.acked = True

    def settle_and_ack(self):
        self.settled += 1
        if self.errors:
            raise self.errors.pop(0)


def ended(transport=None, *, remembered=True, plain=True):
    return SimpleNamespace(
        transport=transport or Transport(),
        completes_key=lambda: remembered,
        is_plain_success=lambda: plain,
        claim=object(),
        acked=False,
        settled=False,
    )


@pytest.fixture
def carrier(monkeypatch):
    """Batches the completions of threads that have more to do."""
    monkeypatch.setattr(
        batched_completions, "settle_and_ack", lambda state, message, delivery: delivery.transport.settle_and_ack()
    )
    monkeypatch.setattr(batched_completions, "_has_more", lambda thread: True)
    dropped = []
    claims = SimpleNamespace(drop=dropped.append, dropped=dropped)
    state = SimpleNamespace(
        outcomes=SimpleNamespace(successes_observed=False),
        stopping=Stopping(),
        idempotency=SimpleNamespace(claims=claims),
    )
    return BatchedCompletions(state, Trips())


def test_the_completion_of_a_plain_success_is_posted(carrier):
    assert carrier.post(MESSAGE, ended())
    assert [post.command for post in carrier.batcher.posted] == [("SET", "key", "done")]


@pytest.mark.parametrize("way", [{"remembered": False}, {"plain": False}])
def test_a_success_without_a_key_or_with_follow_up_messages_is_settled_alone(carrier, way):
    assert not carrier.post(MESSAGE, ended(**way))
    assert carrier.batcher.posted == []


def test_an_observed_success_is_settled_alone(carrier):
    carrier.state.outcomes.successes_observed = True
    assert not carrier.post(MESSAGE, ended())


def test_the_last_success_of_the_moment_is_settled_alone(carrier, monkeypatch):
    monkeypatch.setattr(batched_completions, "_has_more", lambda thread: False)
    assert not carrier.post(MESSAGE, ended())
    assert carrier.batcher.posted == []


def test_nothing_is_sent_where_nothing_was_posted(carrier):
    carrier.flush()
    carrier.flush_if_idle()
    assert carrier.batcher.calls == 0


def test_a_posted_completion_is_sent_as_soon_as_no_message_waits(carrier, monkeypatch):
    carrier.post(MESSAGE, ended())
    carrier.flush_if_idle()
    assert carrier.batcher.calls == 0
    monkeypatch.setattr(batched_completions, "_has_more", lambda thread: False)
    carrier.flush_if_idle()
    assert carrier.batcher.calls == 1


def test_a_thread_waits_for_its_posted_completion_when_another_thread_is_sending_it(carrier):
    carrier.post(MESSAGE, ended())
    carrier.batcher.posted.clear()  # under way, and not answered
    other = threading.Thread(target=carrier.flush)
    other.start()
    other.join()
    assert carrier.batcher.calls == 0
    carrier.flush()
    assert carrier.batcher.calls == 1


def test_an_answered_completion_is_not_waited_for(carrier):
    carrier.post(MESSAGE, ended())
    [post] = carrier.batcher.posted
    carrier.batcher.posted.clear()
    post.answer = 1
    carrier.flush()
    assert carrier.batcher.calls == 0


def test_a_flush_sends_the_completions_of_other_threads_too(carrier):
    other = threading.Thread(target=carrier.post, args=(MESSAGE, ended()))
    other.start()
    other.join()
    carrier.flush()
    assert carrier.batcher.calls == 1


def test_an_ack_is_tried_again_while_the_broker_is_away(carrier):
    transport = Transport(ConnectionClosed("gone"), ConnectionClosed("still gone"))
    carrier._settle(MESSAGE, ended(transport))
    assert transport.settled == 3
    assert carrier.state.stopping.waits == [5.0, 5.0]


def test_an_ack_that_fails_for_another_reason_is_logged_and_ends_no_thread(carrier, caplog):
    transport = Transport(ValueError("a bug"))
    carrier._settle(MESSAGE, ended(transport))
    assert transport.settled == 1
    assert [record.getMessage() for record in caplog.records] == [
        "Message m could not be acknowledged and will be redelivered."
    ]


@pytest.mark.parametrize(("answer", "acked"), [(1, True), (0, False), (OSError("lost"), False)])
def test_any_answer_but_the_expected_one_has_the_message_acked_in_the_ordinary_way(carrier, answer, acked):
    delivery = ended()
    transport = delivery.transport
    carrier.post(MESSAGE, delivery)
    carrier.batcher.posted[0].callback(answer)
    assert transport.settled == 1
    assert delivery.acked is acked
    assert (delivery.claim is None) is acked
    assert (carrier.state.idempotency.claims.dropped != []) is acked


@pytest.mark.parametrize(
    ("state", "more"),
    [({}, True), ({"running": False}, False), ({"paused": True}, False), ({"waiting": []}, False)],
)
def test_a_thread_has_more_to_do_while_it_goes_on_and_messages_wait(state, more):
    state = {"running": True, "paused": False, "waiting": [MESSAGE], **state}
    queue = SimpleNamespace(queue=state.pop("waiting"))
    assert batched_completions._has_more(SimpleNamespace(work_queue=queue, **state)) is more


def test_a_foreign_thread_has_no_more_to_do():
    assert batched_completions._has_more(threading.current_thread()) is False


class Idle(Middleware):
    """Has none of the hooks that matter."""

    def before_enqueue(self, broker, message, delay):
        pass


class Before(Middleware):
    def before_process_message(self, broker, message):
        pass


class After(Middleware):
    def after_ack(self, broker, message):
        pass


@pytest.mark.parametrize(
    ("middleware", "safe"), [((), True), ((Idle(),), True), ((Before(),), False), ((After(),), False)]
)
def test_batching_is_off_where_a_foreign_middleware_acts_between_two_jobs(middleware, safe):
    broker = install(StubBroker())
    for one in middleware:
        broker.add_middleware(one)
    assert BatchedCompletions.is_safe(state_of(broker)) is safe


@pytest.mark.parametrize("package", ["dramatiq", "dramatiq_policies", "sentry_sdk"])
def test_the_middleware_of_a_known_package_leaves_batching_on(package, monkeypatch):
    monkeypatch.setattr(Before, "__module__", f"{package}.integrations")
    broker = install(StubBroker())
    broker.add_middleware(Before())
    assert BatchedCompletions.is_safe(state_of(broker))


@pytest.fixture
def sent_before():
    """Run a job of these options, and return how often posted completions were sent before the job began."""
    stage = Stage(bundle={"idempotency": Idempotency(MemoryStore())})
    sent, counts = [], []
    batched = SimpleNamespace(flush=lambda: sent.append(1), flush_if_idle=int, post=lambda message, delivery: False)
    state_of(stage.broker).idempotency.batched_completions = batched

    def run(options, **message_options):
        job = stage.actor(lambda number: counts.append(len(sent)), actor_name="job", **options)
        stage.broker.enqueue(job.message_with_options(args=(7,), **message_options))
        stage.run()
        return counts

    return run


@pytest.mark.parametrize(
    ("options", "message_options"),
    [
        ({}, {}),
        ({"idempotency_key": lambda number: f"{number}"}, {}),
        ({"done_when": lambda number: False}, {}),
        ({"idempotency_key": "{number}"}, {"redelivered": True}),
    ],
    ids=["without a key", "with the user's code for a key", "with done_when", "redelivered, and perhaps waiting"],
)
def test_posted_completions_are_sent_before_a_job_whose_claim_may_come_late(sent_before, options, message_options):
    """Else another message stays unacknowledged as long as this job runs, and its job runs again after a crash."""
    assert sent_before(options, **message_options) == [1]


def test_posted_completions_wait_for_the_claim_of_a_key_made_from_the_arguments(sent_before):
    assert sent_before({"idempotency_key": "{number}"}) == [0]


def test_posted_completions_are_sent_before_a_job_that_waits_for_the_end_of_a_job_alone(sent_before, monkeypatch):
    monkeypatch.setattr("dramatiq_policies.idempotency.exclusive.ExclusiveRuns.is_open", False)
    assert sent_before({"idempotency_key": "{number}"}) == [1]
