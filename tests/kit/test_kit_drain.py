"""`drain`: Dramatiq's own worker code on the calling thread, on a virtual clock."""

from __future__ import annotations

import functools
import logging
import subprocess
import sys
import textwrap
import threading
import time
from datetime import timedelta

import dramatiq
import dramatiq.common
import pytest
from dramatiq.asyncio import get_event_loop_thread
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import AsyncIO, CurrentMessage, Middleware, SkipMessage
from dramatiq.rate_limits.backends import StubBackend as StubLimits
from dramatiq.results import Results
from dramatiq.results.backends import StubBackend

from dramatiq_policies import (
    ConfigurationError,
    Discard,
    ErrorClassifier,
    Metrics,
    RetryPolicy,
    Snooze,
    constant,
    current_job,
    install,
)
from dramatiq_policies.common import clock
from dramatiq_policies.interrupts import threads as interrupts
from dramatiq_policies.middleware.composition import GroupCallbacks
from dramatiq_policies.testing import TooManyRuns, drain, fail, hang
from dramatiq_policies.testing.virtual_time import VirtualClock, VirtualStop

HOUR = 3_600_000


class Flaky(Exception):
    pass


class Broken(Exception):
    pass


@pytest.fixture
def broker():
    return install(StubBroker())


@pytest.fixture
def actor(broker):
    return functools.partial(dramatiq.actor, broker=broker)


def test_queued_messages_run_on_the_calling_thread(broker, actor):
    ran_on = []

    @actor
    def job(number):
        ran_on.append((number, threading.current_thread()))

    job.send(1)
    job.send(2)
    run = drain(broker)
    assert ran_on == [(1, threading.current_thread()), (2, threading.current_thread())]
    assert run.outcomes(job) == ["succeeded", "succeeded"]
    assert run.elapsed == 0


def test_arguments_have_passed_through_json(broker, actor):
    got = []

    @actor
    def job(value):
        got.append(value)

    job.send({"numbers": (1, 2)})
    drain(broker)
    assert got == [{"numbers": [1, 2]}]


def test_five_attempts_with_hours_between_them_take_no_time(broker, actor):
    @actor(retry_on={Flaky: RetryPolicy(attempts=5, wait=constant(HOUR))})
    def job():
        raise Flaky

    job.send()
    began = time.monotonic()
    run = drain(broker)
    assert time.monotonic() - began < 2
    run.assert_outcomes(job, "retried", "retried", "retried", "retried", "dead")
    run.assert_waits(job, HOUR, HOUR, HOUR, HOUR)
    run.assert_dead(job, "exhausted")
    assert run.elapsed == 4 * HOUR
    assert run.dead[0].options["failure"]["attempts"] == 5


def test_delayed_messages_run_in_the_order_of_their_times_across_queues(broker, actor):
    order = []

    @actor(queue_name="one")
    def one(name):
        order.append(name)

    @actor(queue_name="two")
    def two(name):
        order.append(name)

    one.send_with_options(args=("third",), delay=3 * HOUR)
    two.send_with_options(args=("second",), delay=2 * HOUR)
    one.send_with_options(args=("first",), delay=HOUR)
    two.send("at once")
    run = drain(broker)
    assert order == ["at once", "first", "second", "third"]
    assert 3 * HOUR <= run.elapsed < 3 * HOUR + 1_000


def test_ready_messages_run_by_the_priority_of_their_actors(broker, actor):
    order = []

    @actor(priority=10)
    def slow():
        order.append("slow")

    @actor(priority=0)
    def urgent():
        order.append("urgent")

    slow.send()
    urgent.send()
    drain(broker)
    assert order == ["urgent", "slow"]


def test_messages_that_jobs_send_are_run_too_also_on_queues_that_are_new(broker, actor):
    @actor
    def first():
        @actor(queue_name="new")
        def late():
            pass

        late.send()

    first.send()
    assert drain(broker).outcomes() == ["succeeded", "succeeded"]


def test_a_drain_until_a_time_stops_there_and_the_next_one_goes_on(broker, actor):
    state = {"broken": True}

    @actor(retry_on={Flaky: RetryPolicy(attempts=3, wait=constant(HOUR))})
    def job():
        if state["broken"]:
            raise Flaky

    job.send()
    run = drain(broker, until=timedelta(minutes=30))
    run.assert_outcomes(job, "retried")
    assert run.elapsed == HOUR // 2
    state["broken"] = False
    rest = drain(broker)
    rest.assert_outcomes(job, "succeeded")
    assert rest.elapsed == HOUR // 2


def test_a_message_sent_between_two_drains_is_sent_at_the_virtual_time(broker, actor):
    @actor(max_age=2 * HOUR)
    def job():
        pass

    drain(broker, until=10 * HOUR)
    job.send_with_options(delay=HOUR)
    run = drain(broker)
    assert run.elapsed == HOUR
    run.assert_outcomes(job, "succeeded")


def test_jobs_that_send_themselves_for_ever_are_stopped_and_shown(broker, actor):
    @actor
    def again(number):
        again.send(number + 1)

    again.send(1)
    with pytest.raises(TooManyRuns, match=r"max_runs") as error:
        drain(broker, max_runs=50)
    assert "again(51)" in str(error.value)
    assert "again(52)" in str(error.value)


def test_more_messages_than_max_runs_are_no_endless_loop(broker, actor):
    @actor
    def job():
        pass

    for _ in range(20):
        job.send()
    assert len(drain(broker, max_runs=0).events) == 20


def test_a_drain_within_a_drain_is_refused(broker, actor):
    errors = []

    @actor(discard_on=RuntimeError)
    def job():
        try:
            drain(broker)
        except RuntimeError as error:
            errors.append(str(error))

    job.send()
    drain(broker)
    assert "a job can't call drain()" in errors[0]


def test_a_broker_other_than_a_stub_is_refused_with_advice():
    with pytest.raises(ConfigurationError, match=r"stub\(\)"):
        drain(RedisBroker(url="redis://127.0.0.1:1/0"))


def test_a_broker_without_dramatiq_policies_is_refused_with_advice():
    with pytest.raises(ConfigurationError, match=r"install\(broker\)"):
        drain(StubBroker())


@pytest.mark.parametrize("until", [-1, "soon"])
def test_an_end_that_is_no_duration_is_refused(broker, until):
    with pytest.raises(ConfigurationError, match="until"):
        drain(broker, until=until)


def test_messages_expire_on_the_virtual_clock(broker, actor):
    @actor(timeout=2 * HOUR)
    def slow():
        pass

    @actor(queue_timeout=HOUR)
    def impatient():
        pass

    slow.send()
    impatient.send()
    with hang(slow, times=1):
        run = drain(broker)
    run.assert_outcomes(impatient, "expired")


def test_max_elapsed_counts_on_the_virtual_clock(broker, actor):
    @actor(retry_on={Flaky: RetryPolicy(attempts=25, wait=constant(HOUR), max_elapsed=3 * HOUR)})
    def job():
        raise Flaky

    job.send()
    assert drain(broker).outcomes(job) == ["retried"] * 3 + ["dead"]


def test_an_alert_is_repeated_once_its_interval_is_over_on_the_virtual_clock(actor, broker):
    @actor(alert_on=Broken)
    def job():
        raise Broken

    for hours in (0, 0, 1):
        job.send_with_options(delay=hours * HOUR or None)
    run = drain(broker)
    assert [record.levelno for record in run.logs] == [logging.CRITICAL, logging.WARNING, logging.CRITICAL]


def test_a_job_may_snooze_for_a_day(broker, actor):
    naps = [HOUR] * 24

    @actor
    def job():
        if naps:
            raise Snooze(naps.pop())

    job.send()
    run = drain(broker)
    assert run.outcomes(job) == ["deferred"] * 24 + ["succeeded"]
    assert run.elapsed == 24 * HOUR


def test_the_users_own_clock_is_the_real_one(broker, actor):
    seen = []

    @actor
    def job():
        seen.append(time.time())

    job.send_with_options(delay=24 * HOUR)
    drain(broker)
    assert abs(seen[0] - time.time()) < 60


def test_other_threads_see_the_real_clock_while_a_broker_is_drained(broker, actor):
    seen = []

    @actor
    def job():
        thread = threading.Thread(target=lambda: seen.append(dramatiq.common.current_millis()))
        thread.start()
        thread.join()
        seen.append(dramatiq.common.current_millis())

    job.send_with_options(delay=24 * HOUR)
    drain(broker)
    real = time.time() * 1_000
    assert abs(seen[0] - real) < 60_000
    assert seen[1] - real > 23 * HOUR


def test_pipelines_groups_and_results_work_as_in_production():
    backend = StubBackend()
    broker = StubBroker()
    broker.add_middleware(Results(backend=backend, store_results=True))
    broker.add_middleware(GroupCallbacks(StubLimits()))
    install(broker)
    actor = functools.partial(dramatiq.actor, broker=broker)
    done = []

    @actor
    def add(x, y):
        return x + y

    @actor
    def tell(*numbers):
        done.append(numbers)

    pipe = dramatiq.pipeline([add.message(1, 2), add.message(3)], broker=broker).run()
    members = [add.message(n, n) for n in range(3)]
    group = dramatiq.group(members, broker=broker)
    group.add_completion_callback(tell.message("all"))
    group.run()
    drain(broker).assert_outcomes(add, *["succeeded"] * 5)
    assert pipe.messages[-1].get_result(backend=backend) == 6
    assert [message.get_result(backend=backend) for message in members] == [0, 2, 4]
    assert done == [("all",)]


def test_async_actors_run_on_a_loop_that_ends_with_the_drain():
    broker = StubBroker()
    broker.add_middleware(AsyncIO())
    install(broker)

    @dramatiq.actor(broker=broker, retry_on={Flaky: RetryPolicy(attempts=2, wait=constant(HOUR))})
    async def job(attempts):
        if current_job().attempt < attempts:
            raise Flaky

    job.send(2)
    run = drain(broker)
    run.assert_outcomes(job, "retried", "succeeded")
    assert run.elapsed == HOUR
    assert get_event_loop_thread() is None


def test_no_thread_is_left_behind():
    broker = StubBroker()
    broker.add_middleware(AsyncIO())
    install(broker)

    @dramatiq.actor(broker=broker, timeout=1_000, idempotent=True)
    async def job():
        pass

    @dramatiq.actor(broker=broker, timeout=1_000, idempotent=True)
    def other():
        pass

    interrupts.end_timer()
    for _ in range(2):
        before = threading.enumerate()
        job.send()
        other.send()
        assert drain(broker).outcomes() == ["succeeded", "succeeded"]
        assert threading.enumerate() == before


def test_the_workers_hooks_are_called_as_in_production(broker, actor):
    seen = []

    class Witness(Middleware):
        def __getattribute__(self, name):
            if name.startswith(("before_", "after_")):
                seen.append(name)
            return super().__getattribute__(name)

    broker.add_middleware(Witness())

    @actor
    def job():
        pass

    seen.clear()
    job.send()
    drain(broker)
    assert [name for name in seen if "declare" not in name and "thread" not in name] == [
        "before_enqueue",
        "after_enqueue",
        "before_worker_boot",
        "after_worker_boot",
        "before_process_message",
        "after_process_message",
        "before_ack",
        "after_ack",
        "before_worker_shutdown",
        "after_worker_shutdown",
    ]


def test_a_skipped_message_and_an_unknown_actor_have_their_outcomes(broker, actor):
    class Skip(Middleware):
        def before_process_message(self, broker, message):
            if message.actor_name == "job":
                raise SkipMessage

    broker.add_middleware(Skip())

    @actor
    def job():
        pass

    job.send()
    broker.enqueue(job.message().copy(actor_name="gone"))
    run = drain(broker)
    run.assert_outcomes("gone", "dead")
    run.assert_outcomes(job, "skipped")


def test_a_body_that_can_not_be_read_is_dead(broker, actor):
    @actor
    def job():
        pass

    broker.queues["default"].put(b"rubbish")
    run = drain(broker)
    assert run.reasons() == ["malformed"]
    assert len(run.dead) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, pytest.fail.Exception])
def test_an_exception_of_the_test_framework_is_raised_from_a_job(broker, actor, error):
    @actor
    def job():
        raise error("stop")

    job.send()
    with pytest.raises(error):
        drain(broker)
    assert not broker.queues["default"].queue


def test_nothing_is_left_behind_after_an_error(broker, actor):
    @actor(max_retries=0)
    def job():
        raise KeyboardInterrupt

    real, middleware, stopping = dramatiq.common.time, list(broker.middleware), broker.dramatiq_policies_state.stopping
    job.send_with_options(delay=HOUR)
    with pytest.raises(KeyboardInterrupt):
        drain(broker)
    assert dramatiq.common.time is real is time.time
    assert broker.middleware == middleware
    assert broker.dramatiq_policies_state.stopping is stopping
    assert current_job(None) is None
    assert abs(dramatiq.common.current_millis() - time.time() * 1_000) < 60_000
    assert drain(broker).outcomes() == []


def test_a_real_worker_takes_over_the_messages_that_a_drain_has_left(broker, actor):
    ran = []

    @actor(retry_on={Flaky: RetryPolicy(attempts=2, wait=constant(1))})
    def job():
        ran.append(1)

    job.send()
    with fail(job, Flaky):
        drain(broker, until=0)
    worker = dramatiq.Worker(broker, worker_timeout=10)
    worker.start()
    broker.join("default", timeout=10_000)
    worker.stop()
    assert ran == [1]


def test_the_current_message_is_dramatiqs(broker, actor):
    broker.add_middleware(CurrentMessage())
    seen = []

    @actor
    def job():
        seen.append(CurrentMessage.get_current_message().message_id)

    message = job.send()
    drain(broker)
    assert seen == [message.message_id]


class TestRun:
    @pytest.fixture
    def run(self, broker, actor):
        @actor(retry_on={Flaky: RetryPolicy(attempts=2, wait=constant(1_000))}, discard_on=Broken)
        def job(name, *, loud=False):
            if name == "flaky" and current_job().attempt == 1:
                raise Flaky("no answer")
            if name == "broken":
                raise Broken
            if name == "no use":
                raise Discard("already done")

        job.send("flaky", loud=True)
        job.send("broken")
        job.send("no use")
        return drain(broker)

    def test_a_run_reads_as_a_transcript(self, run):
        assert repr(run).splitlines() == [
            "<Run: 4 deliveries in 1 s>",
            "  +0 ms  job('flaky', loud=True)  attempt 1  retried: Flaky: no answer, again in 1 s",
            "  +0 ms  job('broken')  attempt 1  discarded: Broken: ",
            "  +0 ms  job('no use')  attempt 1  discarded: Discard: already done",
            "  +1 s  job('flaky', loud=True)  attempt 2  succeeded",
        ]

    def test_a_run_of_a_single_delivery_or_none_says_so(self, broker, actor):
        @actor
        def job():
            pass

        assert repr(drain(broker)) == "<Run: 0 deliveries in 0 ms>\n  nothing was queued"
        job.send()
        assert repr(drain(broker)).startswith("<Run: 1 delivery in 0 ms>\n")

    def test_a_failed_assertion_shows_the_actual_outcomes(self, run):
        with pytest.raises(AssertionError) as error:
            run.assert_outcomes("job", "succeeded")
        assert "job: expected succeeded, got retried, discarded, discarded, succeeded." in str(error.value)
        assert "no answer" in str(error.value)
        with pytest.raises(AssertionError, match=r"expected the waits \[2000\] ms, got \[1000\] ms"):
            run.assert_waits("job", 2_000)
        with pytest.raises(AssertionError, match=r"expected dead letters with the reasons \['exhausted'\], got \[\]"):
            run.assert_dead("job", "exhausted")

    def test_a_run_has_the_log_records_of_bad_endings(self, run):
        assert [(record.outcome, record.actor, record.levelname) for record in run.logs] == [
            ("discarded", "job", "WARNING")
        ] * 2

    def test_a_run_has_the_metrics_that_a_worker_would_have_sent(self, run):
        assert run.metrics["jobs.job.retry"] == 1
        assert run.metrics["jobs.job.discard"] == 2
        assert run.metrics["jobs.job.success"] == 1
        assert run.metrics["jobs.job.failure"] == 3
        assert run.metrics["jobs.job.dead"] == 0
        assert "jobs.job.dead" not in run.metrics
        assert len(run.metrics["jobs.job.duration"]) == 4

    def test_a_run_knows_no_actor_that_does_not_exist(self, run):
        with pytest.raises(ValueError, match="Did you mean 'job'"):
            run.outcomes("jobs")

    def test_an_actor_that_did_not_run_has_no_outcomes(self, broker, actor):
        @actor
        def idle():
            pass

        assert drain(broker).outcomes(idle) == []

    def test_a_run_holds_only_its_own_dead_letters(self, broker, actor):
        @actor(max_retries=0)
        def job():
            raise Broken

        job.send()
        assert len(drain(broker).dead) == 1
        job.send()
        run = drain(broker)
        assert len(run.dead) == 1
        with pytest.raises(AssertionError, match="expected no dead letters, got 1"):
            run.assert_nothing_dead()

    def test_waits_with_jitter_are_bounded_by_their_share(self, actor, broker):
        @actor(max_retries=1, min_backoff=1_000, max_backoff=1_000)
        def job():
            raise Flaky

        job.send()
        run = drain(broker)
        (wait,) = run.waits(job)
        run.assert_waits(job, wait)
        run.assert_waits(job, int(wait / 1.5), jitter=0.6)


def test_the_brokers_own_metrics_are_kept_by_their_names_and_sent_to_its_client():
    sent = []

    class Client:
        def incr(self, *args, **kwargs):
            sent.append(args[0])

        timing = gauge = incr

    broker = install(StubBroker(), metrics=Metrics(Client(), prefix="shop"))

    @dramatiq.actor(broker=broker)
    def job():
        pass

    job.send()
    assert drain(broker).metrics["shop.job.success"] == 1
    assert sent == ["shop.job.duration", "shop.job.wait", "shop.job.success"]


def test_a_subscriber_of_the_users_gets_the_same_events():
    told = []
    broker = install(StubBroker(), error_classifier=ErrorClassifier(on_outcome=told.append))

    @dramatiq.actor(broker=broker)
    def job():
        pass

    job.send()
    assert drain(broker).events == told


def test_a_process_under_gevent_is_drained_as_any_other():
    script = """
        from gevent import monkey; monkey.patch_all()
        import time
        import dramatiq, gevent
        from dramatiq.asyncio import get_event_loop_thread
        from dramatiq.brokers.stub import StubBroker
        from dramatiq.middleware import AsyncIO
        from dramatiq_policies import Idempotency, RetryPolicy, TimeoutExceeded, constant, install
        from dramatiq_policies.stores.memory import MemoryStore
        from dramatiq_policies.testing import assert_crash_safe, crash, drain, fail, hang, stub

        HOUR = 3_600_000
        broker = StubBroker()
        broker.add_middleware(AsyncIO())
        install(broker, idempotency=Idempotency(MemoryStore()))
        rules = {"broker": broker, "retry_on": {(ConnectionError, TimeoutExceeded): RetryPolicy(attempts=5, wait=constant(HOUR))}}
        done = []

        @dramatiq.actor(**rules, timeout=HOUR, idempotency_key="{number}")
        def job(number):
            time.sleep(0.001)
            done.append(number)

        @dramatiq.actor(**rules, timeout=50)
        def slow():
            if not done:
                done.append("began")
                time.sleep(10)

        @dramatiq.actor(broker=broker)
        async def of_a_loop():
            done.append("async")

        # Another greenlet sees the real clock, also while the drain waits in a job.
        seen = []
        def look():
            for _ in range(5):
                seen.append(dramatiq.common.current_millis() - time.time() * 1_000)
                time.sleep(0.001)
        other = gevent.spawn(look)

        job.send(1)
        job.send(1)
        job.send_with_options(args=(2,), delay=24 * HOUR)
        with fail(job, ConnectionError), hang(job, times=1), crash(job, after_effect=True):
            run = drain(broker)
        assert sorted(set(done)) == [1, 2], done
        assert run.outcomes(job).count("succeeded") == 2, run
        assert run.outcomes(job).count("duplicate") == 1, run
        assert run.outcomes(job).count("retried") == 2, run
        assert run.elapsed >= 24 * HOUR, run
        other.join()
        assert max(map(abs, seen)) < 60_000, seen

        # A job that really takes too long is really interrupted.
        done.clear()
        slow.send()
        drain(broker).assert_outcomes(slow, "retried", "succeeded")

        done.clear()
        of_a_loop.send()
        drain(broker).assert_outcomes(of_a_loop, "succeeded")
        assert done == ["async"] and get_event_loop_thread() is None

        assert_crash_safe(job, 3, effects=lambda: set(done), reset=done.clear)
        with stub(broker) as other:
            job.send(4)
            drain(other).assert_outcomes(job, "succeeded")
        assert job.broker is broker
        assert dramatiq.common.time is time.time
        """
    pytest.importorskip("gevent")
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


def test_without_idempotency_time_passes_as_well(actor):
    broker = install(StubBroker(), idempotency=False)
    done = []
    job = dramatiq.actor(lambda: done.append(1), actor_name="job", broker=broker)
    job.send_with_options(delay=HOUR)
    drain(broker)
    assert done == [1]


def test_a_message_that_was_made_long_ago_keeps_its_time(broker, actor):
    @actor(max_age=60_000)
    def job():
        pass

    job.send()
    drain(broker)
    broker.enqueue(dramatiq.Message("default", "job", (), {}, {}, message_timestamp=1))
    drain(broker).assert_outcomes(job, "skipped")


class TestVirtualTime:
    def test_virtual_time_is_seen_until_the_last_of_several_clocks_ends(self):
        outer, inner = VirtualClock(lambda: None), VirtualClock(lambda: None)
        with outer.in_force():
            with inner.in_force():
                inner.advance(5_000)
                assert clock.time() == inner.time()
            assert clock.time() == outer.time()
        assert clock.time is time.time

    def test_another_thread_really_sleeps_and_really_waits_meanwhile(self):
        ours = VirtualClock(lambda: None)
        stop = VirtualStop(ours)
        took = []

        def sleep_and_wait():
            began = time.monotonic()
            clock.sleep(0.01)
            took.append(stop.wait(0.01))
            took.append(time.monotonic() - began)

        with ours.in_force():
            before = ours.time()
            thread = threading.Thread(target=sleep_and_wait)
            thread.start()
            thread.join()
            assert ours.time() == before
        assert took[0] is False
        assert took[1] >= 0.02
