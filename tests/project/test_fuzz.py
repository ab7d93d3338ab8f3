"""Random input of every kind: bodies and options through a real worker, and all readers of foreign data.

Seconds by default; `make fuzz` gives each test its share of FUZZ_SECONDS, with new examples each time.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import os
import time

import dramatiq
import pytest
from dramatiq import Message
from dramatiq.middleware import GroupCallbacks, Middleware
from dramatiq.rate_limits.backends import StubBackend as LimitsBackend
from dramatiq.results import Results
from dramatiq.results.backends import StubBackend as ResultsBackend
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from dramatiq_policies import (
    ConfigurationError,
    Discard,
    DiscardLogger,
    ErrorClassifier,
    Heartbeat,
    Idempotency,
    Metrics,
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
from dramatiq_policies.brokers.browser import Item
from dramatiq_policies.brokers.queue_reader import oldest
from dramatiq_policies.common.durations import WEEK_MS
from dramatiq_policies.delivery.actor_options import ACTOR_OPTIONS
from dramatiq_policies.delivery.broker_state import state_of
from dramatiq_policies.delivery.history import POLICIES, History, attempt_of, replays_of, run_of
from dramatiq_policies.delivery.validation import check_composition, check_shape, is_number
from dramatiq_policies.errors import UnknownRecord
from dramatiq_policies.idempotency.actions import Request, next_action
from dramatiq_policies.idempotency.records import Record
from dramatiq_policies.ops.dead_letters.dead_letter import for_replay, read_dead_letter
from dramatiq_policies.rules.wait import bounds_of, safe_wait

from ..support import PlainClient, Stage

FUZZ_SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))


def fuzzed(examples, **strategies):
    """Run a test on a few fixed examples, or on new examples for its share of FUZZ_SECONDS."""

    def decorate(test):
        fuzzed.tests += 1
        few = settings(max_examples=examples, deadline=None, derandomize=True, database=None)
        many = settings(max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        short = few(given(**strategies)(test))

        @functools.wraps(short)
        def run(**fixtures):
            if not FUZZ_SECONDS:
                short(**fixtures)
            until = time.monotonic() + FUZZ_SECONDS / fuzzed.tests if FUZZ_SECONDS else 0.0
            for number in itertools.count(time.time_ns()):
                if time.monotonic() >= until:
                    return
                seed(number)(many(given(**strategies)(test)))(**fixtures)

        run.__signature__ = inspect.signature(short)
        return pytest.mark.timeout(120 + FUZZ_SECONDS)(run)

    return decorate


fuzzed.tests = 0

#: Too long for these tests, and within the seven days of Dramatiq's longest wait.
DAYS = 4 * 86_400_000
HUGE = [2**31, 2**53, 2**63, 10**18, 10**400, -1, -(2**63), 1e308, 1e-9]
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(HUGE)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", "default", "default.DQ", "works", "fails", "nobody", "\ud800", "x" * 3_000, "{x}", "\0"])
)
anything = st.deferred(
    lambda: scalars | st.lists(anything, max_size=2) | st.dictionaries(st.text(max_size=4), anything, max_size=2)
)
messages = st.fixed_dictionaries(
    {
        "queue_name": st.sampled_from(["default", "nowhere"]),
        "actor_name": st.sampled_from(["works", "nobody"]),
        "args": st.just([]) | st.lists(anything, max_size=2),
        "kwargs": st.just({}),
        "options": st.just({}) | st.dictionaries(st.sampled_from(["pipe_ignore", "max_retries"]), anything),
    }
)


def waits(least):
    """Any value but a short wait: a job with permanent failures would be tried again for ever."""
    return anything.filter(lambda value: not (isinstance(value, (int, float)) and value < least))


past = st.fixed_dictionaries(
    {},
    optional={
        "runs": anything | st.dictionaries(st.text(max_size=4), st.lists(anything, max_size=2), max_size=2),
        **dict.fromkeys(("total", "history", "snoozed_since", "snoozes", "deferrals", "replays"), anything),
    },
)
OPTIONS = {
    "min_backoff": waits(DAYS),
    "max_backoff": waits(DAYS),
    "policies": anything | past,
    "failure": anything,
    "pipe_target": anything | messages,
    "group_completion_callbacks": anything | st.lists(messages, max_size=2),
    "group_completion_uuid": anything | st.just("group"),
    **dict.fromkeys(
        (
            *("retries", "max_retries", "throws", "max_age", "traceback", "requeue_timestamp", "eta", "ready_at"),
            *("on_failure", "on_success", "on_retry_exhausted", "store_results", "result_ttl", "pipe_ignore"),
            *("broker_priority", "redelivered", "redis_message_id", "notify_shutdown", "traceparent", "tags"),
            *("idempotency_key", "idempotent", "timeout", "time_limit", "queue_timeout", "retry_on", "max_attempts"),
        ),
        anything,
    ),
}
options = st.dictionaries(st.sampled_from(sorted(OPTIONS)), st.none(), max_size=4).flatmap(
    lambda names: st.fixed_dictionaries({name: OPTIONS[name] for name in names})
)
FIELDS = {
    "queue_name": "default",
    "actor_name": "works",
    "args": [],
    "kwargs": {},
    "options": {},
    "message_id": "m",
    "message_timestamp": 1_700_000_000_000,
}
RAISED = [KeyError, IndexError, Discard, SystemExit]
actors = st.sampled_from(
    [*(error.__name__ for error in RAISED), "works", "fails", "keyed", "picky", "expires", "nobody"]
)
broken_fields = st.dictionaries(st.sampled_from([*FIELDS, "more"]), anything, min_size=1, max_size=2)
bodies = (
    st.builds(lambda name, some: {**FIELDS, "actor_name": name, "options": some}, actors, options)
    | st.builds(lambda name, some: {**FIELDS, "actor_name": name, **some}, actors, broken_fields)
    | st.builds(lambda name, some: {**FIELDS, "actor_name": name, "kwargs": {"x": some}}, actors, anything)
    | anything
).map(lambda value: json.dumps(value).encode())
queues = st.sampled_from(["default", "default", "default.DQ"])
raw_bodies = st.binary(max_size=20) | bodies.flatmap(lambda body: st.integers(0, len(body)).map(lambda end: body[:end]))


def waits_long(queue, body):
    """Whether the body is a message that is to be run in days only, if ever."""
    try:
        message = Message.decode(body)
        check_shape(message)
        if queue == "default":
            check_composition(message.options)
        eta = message.options.get("eta")
        return is_number(eta) and eta > time.time() * 1_000 + DAYS
    except Exception:
        return False


class Deliveries(Middleware):
    """Counts the messages enqueued within the test."""

    def __init__(self):
        # One for each; threads append to it.
        self.expected = []

    def before_enqueue(self, broker, message, delay):
        # Dramatiq's own move out of the delay queue delivers nothing new, and a long wait not within this test.
        moves = getattr(state_of(broker).moving_delayed, "on", False)
        if not moves and (delay or 0) < 1_000:
            self.expected.append(message.message_id)


class Place:
    """A worker for all examples, with an actor for each ending of a job."""

    def __init__(self):
        self.deliveries = Deliveries()
        extra = [Results(backend=ResultsBackend(), store_results=True), GroupCallbacks(LimitsBackend())]
        self.stage = Stage(
            middleware=[*extra, self.deliveries],
            # A message with a taken key waits for a quarter of the lease at most.
            bundle={"idempotency": Idempotency(lease=2_000), "metrics": Metrics(client=PlainClient())},
            retry_on={KeyError: RetryPolicy(attempts=3, wait=0)},
            discard_on=LookupError,
            dead_letter_discards=True,
            min_backoff=DAYS,
        )
        self.ran = set()
        actor = self.stage.actor
        actor(lambda x=None: self.ran.add(x) if isinstance(x, str) else None, actor_name="works")
        actor(lambda x=None: 1 / 0, actor_name="fails")
        for error in RAISED:
            actor(lambda x=None, error=error: self._raise(error("text")), actor_name=error.__name__)
        actor(lambda x=None: x, actor_name="keyed", idempotency_key="k:{x}", alert_on=TypeError)
        actor(lambda x: self._raise(Snooze(DAYS)), actor_name="picky", queue_timeout=60_000)
        actor(lambda x=None: x, actor_name="expires", queue_timeout=1, timeout=1_000)
        self.working = self.stage.working(threads=2)
        self.working.__enter__()
        self.numbers = itertools.count()

    @staticmethod
    def _raise(error):
        raise error

    def deliver(self, some):
        """Put the bodies on the queue with a good message before and after them, and wait for what becomes of them."""
        names = [f"good-{next(self.numbers)}" for _ in range(2)]
        good = [json.dumps({**FIELDS, "message_id": name, "args": [name]}).encode() for name in names]
        for queue, body in (("default", good[0]), *some, ("default", good[1])):
            if not waits_long(queue, body):
                self.deliveries.expected.append(body)
            self.stage.broker.queues[queue].put(body)
        self.stage.collected.wait_for(
            lambda events: len(events) >= len(self.deliveries.expected) and self.ran.issuperset(names),
            f"an outcome for each of {some}",
            patience=10,
        )
        time.sleep(0.002)
        assert len(self.stage.events) == len(self.deliveries.expected), self.stage.events
        worker = self.stage.worker
        assert all(thread.is_alive() for thread in (*worker.workers, *worker.consumers.values()))
        self.deliveries.expected.clear()
        self.stage.events.clear()
        self.ran.clear()
        for letters in self.stage.broker.dead_letters_by_queue.values():
            letters.clear()

    def close(self):
        self.working.__exit__(None, None, None)


@pytest.fixture(scope="module")
def places():
    """Return the worker under test. After a failure the next example gets a new worker."""
    places = []
    with pytest.MonkeyPatch.context() as patch:
        # A worker on a StubBroker takes delay queues for work queues, and waiting messages would hold all its slots.
        patch.setattr(dramatiq.worker, "QUEUE_PREFETCH", 65_535)
        yield places
        for place in places:
            place.close()


@fuzzed(100, some=st.lists(st.tuples(queues, bodies | raw_bodies), min_size=1, max_size=4))
def test_no_body_and_no_option_ends_a_thread_and_each_delivery_has_one_outcome(places, some):
    place = places.pop() if places else Place()
    place.deliver(some)
    places.append(place)


@fuzzed(100, carried=anything | past, retries=anything, failed=st.booleans())
def test_the_history_in_a_message_is_read_or_taken_as_absent(carried, retries, failed):
    options = {POLICIES: carried, "retries": retries, **({"failure": None} if failed else {})}
    history = History(options)
    assert attempt_of(options) == history.attempt >= 1
    assert replays_of(options) == history.replays + failed
    number, _ = history.count("rule", 5)
    assert number >= 1
    history.failed(ValueError("text"), 5, None)
    assert len(history.failures) <= 10
    again = {POLICIES: json.loads(json.dumps(history.option()))}
    assert History(again).option() == history.option()
    assert run_of({**options, **again}) > run_of(options) - failed * 1_000_000


def records():
    field = anything
    fields = st.fixed_dictionaries(
        {},
        optional={
            "s": st.sampled_from(["running", "ending", "waiting", "free"]) | field,
            **{name: st.integers() | field for name in "nbck"},
            **{name: st.text(max_size=4) | field for name in "mot"},
            "e": st.lists(st.tuples(st.text(max_size=4), st.integers() | field), max_size=3) | field,
            "f": field,
        },
    )
    return fields.map(lambda some: b"\x01" + json.dumps(some).encode()) | st.binary(max_size=30).map(
        lambda b: b"\x01" + b
    )


@fuzzed(150, data=records() | st.binary(max_size=20), left=st.integers(), run=st.integers(0), mine=st.booleans())
def test_any_record_is_read_and_decided_on_or_reported_as_unknown(data, left, run, mine):
    try:
        record = Record.decode(data)
    except UnknownRecord:
        return
    assert Record.decode(record.encode()) == record
    next_action(record, left, Request(record.message_id if mine else "other", run, lambda _: False, 3))


@fuzzed(100, body=bodies | raw_bodies)
def test_any_dead_letter_can_be_listed_shown_and_replayed(letters_of, body):
    letter = read_dead_letter(letters_of, "default", Item(body, 5, None))
    json.dumps([letter.row(), letter.asdict(), letter.asdict(args=True)])
    assert oldest([body], 5) >= 0
    if letter.message is None:
        assert letter.reason == "malformed"
    else:
        again = Message.decode(for_replay(letter.message, "default").encode())
        assert replays_of(again.options) >= 1 + letter.replays
        assert attempt_of(again.options) == 1


@pytest.fixture(scope="module")
def letters_of():
    return Stage().broker


objects = (
    anything
    | st.timedeltas()
    | st.datetimes()
    | st.datetimes(timezones=st.timezones())
    | st.binary(max_size=4)
    | st.sampled_from([object(), ValueError, ValueError(), int, [OSError, 5], {OSError: 3}, {OSError: 0}, {"x": 1}])
    | st.sampled_from([len, lambda: 5, lambda *_: -1, lambda *_: 1 / 0, RetryPolicy(), [ValueError, OSError], ()])
)


class TooMany(Exception):
    pass


@fuzzed(150, asked=objects, headers=objects | st.builds(lambda value: {"Retry-After": value}, objects))
def test_a_wait_asked_for_by_a_server_is_within_its_bounds(asked, headers):
    error = TooMany()
    error.retry_after, error.headers, error.response = asked, headers, headers
    wait = retry_after()
    assert bounds_of(wait, 1)[0] <= safe_wait(wait, 1, error) <= bounds_of(wait, 1)[1]


@fuzzed(100, returned=objects)
def test_any_answer_of_a_wait_is_a_delay_that_dramatiq_can_wait(returned):
    assert 0 <= safe_wait(lambda attempt, exception: returned, 1, TooMany()) <= WEEK_MS


DECLARED = sorted(ACTOR_OPTIONS | {"timeout", "queue_timeout", "time_limit", "throws", "retry_when"})
DECLARED += ["max_retries", "min_backoff", "max_backoff", "max_age", "on_retry_exhausted"]


@fuzzed(150, options=st.dictionaries(st.sampled_from(DECLARED), objects, max_size=3))
def test_an_actor_is_declared_or_reported_as_wrong(letters_of, options):
    try:
        declared = dramatiq.actor(lambda x=None: x, broker=letters_of, actor_name="declared", **options)
    except ConfigurationError as error:
        said = str(error)
    else:
        said = None
    letters_of.actors.pop("declared", None)
    if said is not None:
        assert "declared" in said
        assert any(option in said for option in options)
        return
    assert state_of(letters_of).policies["declared"].options is declared.options


ARGUMENTS = [
    (ErrorClassifier, ["retry_on", "discard_on", "alert_on", "unclassified", "max_attempts", "alert_interval"]),
    (ErrorClassifier, ["max_snooze", "dead_letter_discards", "after_discard", "on_outcome", "retry_when"]),
    (Timeout, ["default", "queue_default", "grace", "on_stuck"]),
    (Idempotency, ["store", "lease", "ttl", "on_store_error", "max_crashes"]),
    (Heartbeat, ["interval", "silence"]),
    (QueueMonitor, ["interval", "thresholds", "on_alert", "queue_prefix", "in_workers"]),
    (DiscardLogger, ["level", "log_args"]),
    (Metrics, ["prefix", "queue_prefix"]),
    (RetryPolicy, ["attempts", "wait", "max_elapsed", "then"]),
    (exponential, ["initial", "maximum", "factor", "jitter"]),
    (polynomial, ["power", "scale", "offset", "maximum", "jitter"]),
    (constant, ["ms"]),
    (retry_after, ["fallback", "maximum"]),
    (Threshold, ["ready", "oldest", "stalled", "dead", "notify_clear"]),
    (Snooze, ["delay"]),
]
built = st.sampled_from(ARGUMENTS).flatmap(
    lambda one: st.tuples(st.just(one[0]), st.dictionaries(st.sampled_from(one[1]), objects, min_size=1, max_size=2))
)


@fuzzed(200, one=built)
def test_a_middleware_built_with_rubbish_is_a_configuration_error(one):
    what, arguments = one
    said = None
    try:
        what(**arguments)
    except ConfigurationError as error:
        said = str(error)
    except (TypeError, ValueError):
        # Raised in a job, as by any wrong call.
        assert what is Snooze
    assert said is None or what is Threshold or any(name in said for name in arguments)
