"""Every way in which a delivery can end, on real servers, with a real worker: the record, and where the message is."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter

import dramatiq
import pytest
from dramatiq import Worker, group, pipeline
from dramatiq.middleware import GroupCallbacks, SkipMessage
from dramatiq.rate_limits.backends import StubBackend as LimiterBackend
from dramatiq.results import ResultFailure, Results
from dramatiq.results.backends import StubBackend

from dramatiq_policies import Discard, RetryPolicy, Snooze, TimeoutExceeded, constant, current_job

from .places import Place, until


class Transient(Exception):
    pass


class Permanent(Exception):
    pass


class Misconfigured(Exception):
    pass


def test_a_job_succeeds(place: Place) -> None:
    app = place.app()
    seen = []

    @app.actor
    def job(x, y=None):
        seen.append((x, y, current_job().attempt))

    message = job.send(1, y=2)
    app.work_until("succeeded")

    assert seen == [(1, 2, 1)]
    (event,) = app.events
    assert (event.actor, event.queue, event.message_id, event.attempt) == ("job", place.queue, message.message_id, 1)
    assert event.wait_ms >= 0
    assert event.duration_ms >= 0
    assert place.left() == []
    assert place.dead() == []


@pytest.mark.parametrize("wait", [0, 150])
def test_a_job_is_retried_and_then_succeeds(place: Place, wait: int) -> None:
    app = place.app()
    started = []

    @app.actor(retry_on={Transient: RetryPolicy(attempts=4, wait=constant(wait))})
    def job():
        started.append(time.time())
        if len(started) < 3:
            raise Transient("not yet")

    message = job.send()
    app.work_until("retried", "retried", "succeeded")

    # With no wait the second run may end before the first one's record is published.
    events = sorted(app.events, key=lambda event: event.attempt)
    assert [event.outcome for event in events] == ["retried", "retried", "succeeded"]
    assert [event.attempt for event in events] == [1, 2, 3]
    assert {event.message_id for event in events} == {message.message_id}
    assert [event.delay_ms for event in events] == [wait, wait, None]
    assert all((later - earlier) * 1_000 >= wait - 5 for earlier, later in itertools.pairwise(started))
    assert place.left() == []
    assert place.dead() == []


def test_an_exhausted_job_is_a_dead_letter_that_says_why(place: Place) -> None:
    app = place.app()
    hooked = []

    @app.actor(
        retry_on={Transient: RetryPolicy(attempts=2, wait=constant(10))},
        after_discard=lambda message, error: hooked.append((message.message_id, type(error))),
    )
    def job(x):
        raise Transient(f"no {x}")

    message = job.send("tea")
    app.work_until("retried", "dead")

    assert app.events[-1].reason == "exhausted"
    (letter,) = place.dead()
    assert (letter.message_id, letter.actor_name, letter.args) == (message.message_id, "job", ("tea",))
    assert letter.queue_name == place.queue
    failure = letter.options["failure"]
    assert failure["outcome"] == "dead"
    assert failure["reason"] == "exhausted"
    assert failure["exception"] == f"{__name__}.Transient"
    assert failure["message"] == "no tea"
    assert "Transient: no tea" in failure["traceback"]
    assert failure["attempts"] == 2
    assert [run["delay_ms"] for run in failure["history"]] == [10, None]
    assert [run["attempt"] for run in failure["history"]] == [1, 2]
    assert abs(failure["failed_at"] - time.time() * 1_000) < 60_000
    assert hooked == [(message.message_id, Transient)]
    assert place.left() == []


def test_an_unclassified_error_is_retried_as_the_stock_options_say_and_then_dead(place: Place) -> None:
    app = place.app()

    @app.actor(max_retries=1, min_backoff=1, max_backoff=1)
    def job():
        raise ValueError("x")

    job.send()
    app.work_until("retried", "dead")
    assert app.events[-1].reason == "exhausted"
    (letter,) = place.dead()
    assert letter.options["failure"]["attempts"] == 2
    assert place.left() == []


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("error", [Permanent("gone"), Discard("already refunded")], ids=["rule", "verb"])
def test_a_discarded_job_is_gone_or_kept_if_asked(place: Place, error: Exception, keep: bool) -> None:
    app = place.app()

    @app.actor(discard_on=Permanent, dead_letter_discards=keep)
    def job():
        raise error

    message = job.send()
    app.work_until("discarded")

    letters = place.dead()
    assert [letter.message_id for letter in letters] == ([message.message_id] if keep else [])
    assert all(letter.options["failure"]["outcome"] == "discarded" for letter in letters)
    assert place.left() == []


def test_an_alerted_job_is_logged_at_critical_and_kept_for_replay(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    app = place.app()

    @app.actor(alert_on=Misconfigured)
    def job():
        raise Misconfigured("no key")

    message = job.send()
    app.work_until("alerted")

    (letter,) = place.dead()
    assert letter.message_id == message.message_id
    assert letter.options["failure"]["outcome"] == "alerted"
    assert [r.levelname for r in caplog.records if r.name == "dramatiq_policies.alerts"] == ["CRITICAL"]
    assert place.left() == []


def test_a_snoozed_job_is_deferred_and_uses_no_attempt(place: Place) -> None:
    app = place.app()
    attempts = []

    @app.actor(max_retries=0)
    def job():
        attempts.append(current_job().attempt)
        if len(attempts) == 1:
            raise Snooze(50)

    job.send()
    app.work_until("deferred", "succeeded")

    assert attempts == [1, 1]
    assert (app.events[0].reason, app.events[0].delay_ms) == ("snoozed", 50)
    assert place.left() == []
    assert place.dead() == []


def test_a_job_that_waited_too_long_expires_unrun(place: Place) -> None:
    app = place.app()
    ran = []

    @app.actor(queue_timeout=30)
    def job():
        ran.append(1)

    message = job.send()
    sent = time.monotonic()
    until(lambda: time.monotonic() > sent + 0.05)
    app.work_until("expired")

    assert ran == []
    (letter,) = place.dead()
    assert letter.message_id == message.message_id
    assert letter.options["failure"]["outcome"] == "expired"
    assert letter.options["failure"]["exception"] == "dramatiq_policies.errors.QueueTimeoutExceeded"
    assert place.left() == []


def test_a_message_for_an_unknown_actor_is_a_dead_letter_and_the_next_one_runs(place: Place) -> None:
    app = place.app()

    @app.actor
    def gone():
        pass

    @app.actor
    def job():
        pass

    unknown = gone.send()
    job.send()
    del app.broker.actors["gone"]
    app.work_until("dead", "succeeded")

    dead = next(event for event in app.events if event.outcome == "dead")
    assert (dead.reason, dead.actor) == ("unknown_actor", "gone")
    (letter,) = place.dead()
    assert letter.message_id == unknown.message_id
    assert letter.options["failure"]["reason"] == "unknown_actor"
    assert place.left() == []


def test_a_job_that_runs_too_long_is_interrupted(place: Place) -> None:
    app = place.app()

    @app.actor(timeout=100, max_retries=0)
    def job():
        while True:
            time.sleep(0.005)

    message = job.send()
    app.work_until("dead")

    assert isinstance(app.events[0].exception, TimeoutExceeded)
    assert 90 <= app.events[0].duration_ms < 2_000
    (letter,) = place.dead()
    assert letter.message_id == message.message_id
    assert letter.options["failure"]["exception"] == "dramatiq_policies.errors.TimeoutExceeded"
    assert place.left() == []


def test_a_timed_out_job_is_retried_when_a_rule_says_so(place: Place) -> None:
    app = place.app()
    runs = []

    @app.actor(timeout=100, retry_on={TimeoutExceeded: RetryPolicy(attempts=2, wait=constant(0))})
    def job():
        runs.append(1)
        while len(runs) == 1:
            time.sleep(0.005)

    job.send()
    app.work_until("retried", "succeeded")
    assert place.left() == []
    assert place.dead() == []


def test_a_thrown_error_is_dead_as_thrown(place: Place) -> None:
    app = place.app()

    @app.actor(throws=[Permanent])
    def job():
        raise Permanent

    job.send()
    app.work_until("dead")
    assert app.events[0].reason == "thrown"
    assert [letter.options["failure"]["reason"] for letter in place.dead()] == ["thrown"]
    assert place.left() == []


@pytest.mark.parametrize("fails", [False, True])
def test_a_message_that_another_middleware_skips(place: Place, fails: bool) -> None:
    app = place.app()

    class Skipper(GroupCallbacks):
        def __init__(self):
            super().__init__(LimiterBackend())

        def before_process_message(self, broker, message):
            if fails:
                message.fail()
            raise SkipMessage("not today")

    @app.actor
    def job():
        raise AssertionError("it runs")

    app.broker.add_middleware(Skipper())
    message = job.send()
    app.work_until("skipped")
    assert [letter.message_id for letter in place.dead()] == ([message.message_id] if fails else [])
    assert place.left() == []


def test_a_pipeline_hands_its_results_on_through_retries(place: Place) -> None:
    app = place.app()
    seen = []

    @app.actor(retry_on={Transient: RetryPolicy(attempts=3, wait=constant(0))})
    def double(x):
        if current_job().attempt == 1:
            raise Transient
        return 2 * x

    @app.actor
    def keep(x):
        seen.append(x)

    pipeline([double.message(1), double.message(), keep.message()], broker=app.broker).run()
    app.work_until("retried", "succeeded", "retried", "succeeded", "succeeded")

    assert seen == [4]
    assert place.left() == []
    assert place.dead() == []


def test_a_pipeline_stops_at_a_dead_stage(place: Place) -> None:
    app = place.app()

    @app.actor(discard_on=Permanent)
    def first():
        raise Permanent

    @app.actor
    def second(x):
        raise AssertionError("it runs")

    pipeline([first.message(), second.message()], broker=app.broker).run()
    app.work_until("discarded")
    assert place.left() == []


def test_a_group_s_callback_runs_once_when_all_members_are_done(place: Place) -> None:
    app = place.app()
    app.broker.add_middleware(GroupCallbacks(LimiterBackend()))
    called = []
    done = []

    @app.actor(retry_on={Transient: RetryPolicy(attempts=3, wait=constant(0))})
    def member(x):
        if x == 1 and current_job().attempt == 1:
            raise Transient
        done.append(x)

    @app.actor
    def callback():
        called.append(sorted(done))

    members = group([member.message(x) for x in range(5)], broker=app.broker)
    members.add_completion_callback(callback.message())
    members.run()
    app.work_until("retried", *["succeeded"] * 6)

    assert called == [[0, 1, 2, 3, 4]]
    assert place.left() == []
    assert place.dead() == []


@pytest.mark.parametrize(
    ("options", "outcome", "text"),
    [
        ({"discard_on": Permanent}, "discarded", "discarded: gone"),
        ({"alert_on": Permanent}, "alerted", "alerted: gone"),
        ({"retry_on": {Permanent: 1}}, "dead", "dead: gone"),
        # No rule had a say: what Dramatiq itself would store.
        ({"max_retries": 0}, "dead", "gone"),
        ({"throws": Permanent}, "dead", "gone"),
    ],
    ids=["discard_on", "alert_on", "retry_on", "max_retries", "throws"],
)
def test_the_stored_failure_of_a_job_names_its_outcome(place: Place, options, outcome, text) -> None:
    app = place.app()
    backend = StubBackend()
    app.broker.add_middleware(Results(backend=backend))

    @app.actor(store_results=True, **options)
    def job():
        raise Permanent("gone")

    message = job.send()
    app.work_until(outcome)

    with pytest.raises(ResultFailure) as failure:
        message.get_result(backend=backend, block=True, timeout=3_000)
    assert failure.value.orig_exc_type == "Permanent"
    assert failure.value.orig_exc_msg == text
    assert place.left() == []


def test_a_result_that_expired_unrun_is_settled_and_a_good_one_kept(place: Place) -> None:
    app = place.app()
    backend = StubBackend()
    app.broker.add_middleware(Results(backend=backend))

    @app.actor(store_results=True)
    def good():
        return 42

    @app.actor(store_results=True, queue_timeout=1)
    def late():
        return 43

    kept, expired = good.send(), late.send()
    sent = time.monotonic()
    until(lambda: time.monotonic() > sent + 0.02)
    app.work_until("succeeded", "expired")

    assert kept.get_result(backend=backend, block=True, timeout=3_000) == 42
    with pytest.raises(ResultFailure) as failure:
        expired.get_result(backend=backend, block=True, timeout=3_000)
    assert failure.value.orig_exc_type == "QueueTimeoutExceeded"
    assert failure.value.orig_exc_msg.startswith("expired")
    assert place.left() == []


def test_delayed_messages_run_in_their_time_each_once(place: Place) -> None:
    app = place.app()
    started = []
    lock = threading.Lock()

    @app.actor
    def job(number, due):
        with lock:
            started.append((number, time.time() * 1_000 - due))

    now = time.time() * 1_000
    for number in range(10):
        delay = 100 + 40 * number
        job.send_with_options(args=(number, now + delay), delay=delay)
    app.work_until(*["succeeded"] * 10)

    assert sorted(number for number, _ in started) == list(range(10))
    assert all(late >= -5 for _, late in started), started
    assert all(event.wait_ms < 1_000 for event in app.events)
    assert place.left() == []
    assert place.dead() == []


def test_messages_not_yet_due_when_the_worker_stops_wait_for_the_next_one(place: Place) -> None:
    app = place.app()
    started = []

    @app.actor
    def job(number):
        started.append(number)

    for number in range(5):
        job.send_with_options(args=(number,), delay=600)
    job.send(99)
    app.work_until("succeeded")
    assert started == [99]

    app.work_until(*["succeeded"] * 6)
    assert sorted(started) == [0, 1, 2, 3, 4, 99]
    assert place.left() == []
    assert place.dead() == []


def test_many_jobs_of_every_kind_end_each_exactly_once(place: Place) -> None:
    app = place.app()

    @app.actor(
        retry_on={Transient: RetryPolicy(attempts=2, wait=constant(5))},
        discard_on=Permanent,
        alert_on=Misconfigured,
    )
    def job(number):
        kind = number % 5
        if kind == 1 and current_job().attempt == 1:
            raise Transient
        if kind == 2:
            raise Transient
        if kind == 3:
            raise Permanent
        if kind == 4:
            raise Misconfigured

    sent = [job.send(number) for number in range(100)]
    expected = ["succeeded"] * 40 + ["retried"] * 40 + ["dead"] * 20 + ["discarded"] * 20 + ["alerted"] * 20
    app.work_until(*expected, threads=8)

    dead = sorted(letter.message_id for letter in place.dead())
    assert dead == sorted(message.message_id for message in sent if message.args[0] % 5 in (2, 4))
    assert place.left() == []


@pytest.mark.parametrize("to_bundle", [True, False], ids=["stock to bundle", "bundle to stock"])
def test_queues_are_taken_over_with_retries_under_way(place: Place, to_bundle: bool) -> None:
    done: Counter[int] = Counter()
    tried: Counter[int] = Counter()

    def declare(broker, retrying):
        @dramatiq.actor(broker=broker, queue_name=place.queue)
        def job(number):
            done[number] += 1

        @dramatiq.actor(broker=broker, queue_name=place.queue, **retrying)
        def flaky(number):
            tried[number] += 1
            if tried[number] <= 2:
                raise Transient(number)
            done[number] += 1

        @dramatiq.actor(broker=broker, queue_name=place.queue, max_retries=0)
        def hopeless(number):
            raise Transient(number)

        return job, flaky, hopeless

    def work(broker, condition):
        worker = Worker(broker, worker_timeout=100, worker_threads=4)
        worker.start()
        try:
            until(condition, describe=lambda: (done, tried))
            # Stock forgets what it has fetched and not yet looked at when it stops: let it come to rest.
            time.sleep(0.5)
        finally:
            worker.stop()
            broker.close()

    stock = place.broker(), {"max_retries": 3, "min_backoff": 2_000, "max_backoff": 2_500}
    ours = place.app().broker, {"retry_on": {Transient: RetryPolicy(attempts=4, wait=constant(2_000))}}
    before, after = (stock, ours) if to_bundle else (ours, stock)

    job, flaky, hopeless = declare(*before)
    for number in range(10):
        job.send(number)
        flaky.send(100 + number)
    for number in range(200, 205):
        job.send_with_options(args=(number,), delay=2_000)
    hopeless.send(0)
    work(before[0], lambda: len(tried) == 10 and len(done) >= 10)
    assert not any(number in done for number in range(100, 110))

    job, flaky, hopeless = declare(*after)
    job.send(300)
    hopeless.send(1)
    expected = {*range(10), *range(100, 110), *range(200, 205), 300}
    letters = []
    work(
        after[0],
        lambda: letters.extend(place.dead()[len(letters) :]) or (done.keys() == expected and len(letters) == 2),
    )

    assert set(done.values()) == {1}
    assert {tried[number] for number in range(100, 110)} == {3}
    assert sorted(letter.args for letter in letters) == [(0,), (1,)]
    assert place.left() == []
