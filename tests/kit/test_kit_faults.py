"""The test kit's faults, under `drain` and where that makes sense under a real worker."""

from __future__ import annotations

import asyncio
import datetime as dt
import functools
import time

import dramatiq
import pytest
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.errors import ConnectionFailed
from dramatiq.middleware import AsyncIO

from dramatiq_policies import (
    ConfigurationError,
    Idempotency,
    Outcome,
    RetryPolicy,
    Timeout,
    TimeoutExceeded,
    constant,
    current_job,
    install,
)
from dramatiq_policies.stores.memory import MemoryStore
from dramatiq_policies.testing import (
    TooManyRuns,
    crash,
    drain,
    enqueue_down,
    fail,
    hang,
    perform,
    redeliver,
    store_down,
)

HOUR = 3_600_000


class Flaky(Exception):
    pass


class RateLimited(Exception):
    def __init__(self, seconds):
        self.retry_after = seconds


@pytest.fixture
def broker():
    broker = StubBroker()
    broker.add_middleware(AsyncIO())
    return install(broker)


@pytest.fixture
def actor(broker):
    return functools.partial(
        dramatiq.actor,
        broker=broker,
        retry_on={(Flaky, RateLimited, TimeoutExceeded): RetryPolicy(attempts=3, wait=constant(HOUR))},
    )


@pytest.fixture(params=["sync", "async"])
def job(request, actor):
    """A job whose effect is seen in `job.done`."""
    done = []

    if request.param == "async":

        @actor(timeout=30_000)
        async def job(number):
            await asyncio.sleep(0)
            done.append(number)
    else:

        @actor(timeout=30_000)
        def job(number):
            done.append(number)

    job.done = done
    return job


def work(broker):
    worker = dramatiq.Worker(broker, worker_timeout=10, worker_threads=1)
    worker.start()
    try:
        broker.join("default", timeout=10_000, fail_fast=False)
    finally:
        worker.stop()


def test_fail_raises_instead_of_doing_the_work(broker, job):
    job.send(1)
    with fail(job, Flaky, times=2):
        run = drain(broker)
    run.assert_outcomes(job, "retried", "retried", "succeeded")
    run.assert_waits(job, HOUR, HOUR)
    assert job.done == [1]


def test_fail_always(broker, job):
    job.send(1)
    with fail(job, Flaky("down"), times=None):
        drain(broker).assert_outcomes(job, "retried", "retried", "dead")
    assert job.done == []
    assert perform(job, 2).outcome is Outcome.SUCCEEDED


def test_fail_takes_an_instance(broker, job):
    job.send(1)
    with fail(job, RateLimited(5)):
        run = drain(broker)
    assert run.events[0].exception.retry_after == 5


@pytest.mark.parametrize("wrong", [RateLimited, "Flaky", int])
def test_fail_refuses_an_object_that_can_not_be_raised(job, wrong):
    with pytest.raises(ConfigurationError, match=r"fail\('job'\).*exception"):
        fail(job, wrong)


@pytest.mark.parametrize("times", [-1, 1.5, True])
def test_times_that_are_no_count_are_refused(job, times):
    for fault in (functools.partial(fail, job, Flaky), functools.partial(hang, job), functools.partial(crash, job)):
        with pytest.raises(ConfigurationError, match="times"):
            fault(times=times)


def test_faults_nest(broker, job):
    job.send(1)
    with fail(job, Flaky, times=2), hang(job, times=1):
        run = drain(broker)
    assert [type(event.exception) for event in run.events[:2]] == [TimeoutExceeded, Flaky]
    run.assert_outcomes(job, "retried", "retried", "dead")


def test_after_a_fault_the_function_is_the_actors_own_also_when_the_test_fails(job):
    fn = job.fn
    with pytest.raises(ZeroDivisionError), fail(job, Flaky):
        assert job.fn is not fn
        raise ZeroDivisionError
    assert job.fn is fn


def test_fail_works_under_a_real_worker(broker, actor):
    @actor(retry_on={Flaky: RetryPolicy(attempts=2, wait=constant(1))})
    def job():
        done.append(1)

    done = []
    job.send()
    with fail(job, Flaky):
        work(broker)
    assert done == [1]


def test_a_job_that_hangs_meets_its_timeout_at_once(broker, job):
    job.send(1)
    began = time.monotonic()
    with hang(job, times=1):
        run = drain(broker)
    assert time.monotonic() - began < 2
    run.assert_outcomes(job, "retried", "succeeded")
    assert isinstance(run.events[0].exception, TimeoutExceeded)
    assert 30_000 <= run.events[0].duration_ms < 31_000
    assert run.elapsed == HOUR + 30_000
    assert job.done == [1]


def test_a_job_hangs_in_all_runs_by_default(broker, job):
    job.send(1)
    with hang(job):
        drain(broker).assert_outcomes(job, "retried", "retried", "dead")


def test_a_messages_own_timeout_counts(broker, job):
    job.send_with_options(args=(1,), timeout=5_000)
    with hang(job, times=1):
        run = drain(broker, until=HOUR - 1)
    assert 5_000 <= run.events[0].duration_ms < 6_000


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_hang_really_hangs_under_a_real_worker(broker, actor, kind):
    if kind == "async":

        @actor(timeout=100, max_retries=0, retry_on=())
        async def job():
            pass
    else:

        @actor(timeout=100, max_retries=0, retry_on=())
        def job():
            pass

    job.send()
    with hang(job):
        work(broker)
    assert broker.dead_letters[0].options["failure"]["exception"].endswith("TimeoutExceeded")


def test_a_job_without_a_timeout_can_not_hang():
    broker = install(StubBroker(), timeout=Timeout(default=float("inf")))

    @dramatiq.actor(broker=broker)
    def job():
        pass

    with pytest.raises(ConfigurationError, match="hang forever"):
        hang(job)


def test_a_crash_before_the_effect_is_followed_by_a_redelivery(broker, job):
    message = job.send(1)
    with crash(job):
        run = drain(broker)
    run.assert_outcomes(job, "succeeded")
    assert job.done == [1]
    assert run.events[0].message_id == message.message_id
    assert run.events[0].attempt == 1
    assert "the worker died; the message is redelivered" in repr(run)


def test_a_crash_after_the_effect_has_it_happen_twice(broker, job):
    job.send(1)
    with crash(job, after_effect=True):
        drain(broker)
    assert job.done == [1, 1]


def test_nothing_of_a_crashed_run_reaches_a_hook_or_an_observer(broker, actor):
    seen = []

    class Witness(dramatiq.Middleware):
        def after_process_message(self, broker, message, *, result=None, exception=None):
            seen.append("processed")

        def before_ack(self, broker, message):
            seen.append("ack")

    broker.add_middleware(Witness())

    @actor
    def job():
        pass

    job.send()
    with crash(job, times=2):
        run = drain(broker)
    assert seen == ["processed", "ack"]
    assert len(run.events) == 1


def test_a_job_that_catches_everything_dies_all_the_same(broker, actor):
    @actor
    def inner():
        pass

    @actor
    def job():
        try:
            inner()
        except BaseException:
            pass

    job.send()
    with crash(inner):
        run = drain(broker)
    assert [entry.event is None for entry in run.entries] == [True, False]


def test_a_crash_in_the_second_attempt_redelivers_the_second_attempt(broker, job):
    job.send(1)
    with fail(job, Flaky):
        drain(broker, until=0)
    with crash(job):
        run = drain(broker)
    assert [event.attempt for event in run.events] == [2]


def test_a_job_that_kills_its_worker_each_time_is_quarantined(broker, job):
    job.send(1)
    with crash(job, times=None):
        run = drain(broker)
    run.assert_dead(job, "crashed")
    assert repr(run).count("the worker died") == 3


def test_a_job_that_kills_its_worker_each_time_is_an_endless_loop_without_the_quarantine():
    broker = install(StubBroker(), idempotency=False)

    @dramatiq.actor(broker=broker)
    def job():
        pass

    job.send()
    with crash(job, times=None), pytest.raises(TooManyRuns, match="worker died"):
        drain(broker, max_runs=20)


def test_no_worker_but_a_drains_can_die(broker, actor):
    @actor(max_retries=0)
    def job():
        pass

    job.send()
    with crash(job):
        work(broker)
    assert "only drain()" in broker.dead_letters[0].options["failure"]["message"]


def test_a_redelivery_is_the_same_message_again(broker, actor):
    seen = []

    @actor
    def job():
        seen.append(current_job().message_id)

    message = job.send()
    with redeliver(message, broker):
        drain(broker)
    assert seen == [message.message_id] * 2
    with pytest.raises(ConfigurationError, match="StubBroker"):
        redeliver(message, RedisBroker(url="redis://127.0.0.1:1/0"))


def test_a_retry_is_published_as_soon_as_the_broker_takes_it(broker, job):
    job.send(1)
    with fail(job, Flaky), enqueue_down(broker, times=3):
        run = drain(broker)
    run.assert_outcomes(job, "retried", "succeeded")


def test_a_broker_that_stays_down_leaves_the_message_on_its_queue(broker, job):
    job.send(1)
    with fail(job, Flaky), enqueue_down(broker):
        run = drain(broker)
    run.assert_outcomes(job, "interrupted")
    assert run.reasons() == ["handoff_failed"]
    drain(broker).assert_outcomes(job, "succeeded")


def test_a_first_drain_while_the_broker_is_down_leaves_later_sends_in_virtual_time(broker, job):
    with enqueue_down(broker, times=0):
        drain(broker)
    drain(broker, until=600_000)
    job.send_with_options(args=(1,), delay=60_000)
    assert drain(broker).elapsed == 60_000


def test_a_publish_that_is_refused_for_another_reason_ends_in_the_dead_letters(broker, job):
    job.send(1)
    with fail(job, Flaky), enqueue_down(broker, ValueError("no")):
        run = drain(broker)
    run.assert_dead(job, "handoff_failed")


def test_a_delayed_message_waits_for_the_broker(broker, job):
    job.send_with_options(args=(1,), delay=HOUR)
    with enqueue_down(broker, times=2):
        drain(broker).assert_outcomes(job, "succeeded")


def test_a_send_while_the_broker_is_down_raises_connection_failed(broker, job):
    with enqueue_down(broker), pytest.raises(ConnectionFailed):
        job.send(1)
    job.send(1)
    drain(broker).assert_outcomes(job, "succeeded")


class TestIdempotency:
    """Idempotency in the kit; tests/idempotency/test_idempotency.py has the rules."""

    @pytest.fixture
    def once(self, actor):
        done = []

        @actor(idempotency_key="job:{number}", timeout=10 * HOUR)
        def once(number):
            done.append(number)

        once.done = done
        return once

    def test_a_job_whose_worker_died_is_taken_over_at_once(self, broker, once):
        once.send(1)
        with crash(once):
            run = drain(broker)
        run.assert_outcomes(once, "succeeded")
        assert run.elapsed == 0
        assert once.done == [1]

    def test_another_message_with_the_key_waits_until_the_retry_of_the_first_has_succeeded(self, broker, once):
        once.send(1)
        once.send(1)
        with fail(once, Flaky):
            run = drain(broker)
        assert run.outcomes(once)[0] == "retried"
        assert run.outcomes(once).count("succeeded") == 1
        assert "deferred" in run.outcomes(once)
        assert once.done == [1]

    def test_a_lease_is_renewed_on_the_virtual_clock_while_a_job_hangs(self, broker, once):
        once.send(1)
        once.send(1)
        with hang(once, times=1):
            run = drain(broker)
        assert run.outcomes(once)[:2] == ["retried", "deferred"]
        assert once.done == [1]

    def test_a_key_is_forgotten_after_its_ttl_on_the_virtual_clock(self, broker, once):
        once.send(1)
        once.send_with_options(args=(1,), delay=23 * HOUR)
        once.send_with_options(args=(1,), delay=25 * HOUR)
        drain(broker).assert_outcomes(once, "succeeded", "duplicate", "succeeded")

    def test_while_the_store_is_down_the_message_waits_on_its_queue(self, broker, once):
        once.send(1)
        with store_down(broker):
            run = drain(broker)
            run.assert_outcomes(once, "deferred")
            assert run.reasons(once) == ["store_down"]
            drain(broker).assert_outcomes(once, "deferred")
            assert drain(broker, until=HOUR).outcomes(once).count("deferred") > 10
        assert once.done == []
        drain(broker).assert_outcomes(once, "succeeded")

    def test_a_store_that_comes_back_is_waited_for(self, broker, once):
        once.send(1)
        with store_down(broker, times=2):
            drain(broker).assert_outcomes(once, "deferred", "deferred", "succeeded")

    def test_a_completion_that_can_not_be_written_is_tried_again_without_waiting(self, broker, once):
        once.send(1)
        down = store_down(broker)

        @dramatiq.actor(broker=broker, idempotent=True)
        def last():
            down.__enter__()

        last.send()
        began = time.monotonic()
        run = drain(broker)
        down.__exit__(None, None, None)
        assert time.monotonic() - began < 2
        run.assert_outcomes(last, "succeeded")

    def test_a_broker_without_a_store_can_not_lose_it(self):
        with (
            pytest.raises(ConfigurationError, match="no Idempotency"),
            store_down(install(StubBroker(), idempotency=False)),
        ):
            pass

    def test_done_when_is_asked_before_a_fault(self, broker, actor):
        done = [False]

        @actor(done_when=lambda: done[0])
        def job():
            done[0] = True

        job.send()
        with fail(job, Flaky):
            drain(broker).assert_outcomes(job, "retried", "succeeded")
        assert perform(job).reason == "done"
        with fail(job, Flaky):
            assert perform(job).reason == "done"


class TestPerform:
    def test_a_perform_is_one_run_and_leaves_nothing_queued(self, broker, job):
        with fail(job, Flaky):
            event = perform(job, 1)
        assert (event.outcome, event.attempt, event.delay_ms) == (Outcome.RETRIED, 1, HOUR)
        assert drain(broker).events == []
        assert perform(job, number=2).outcome == "succeeded"
        assert job.done == [2]

    def test_a_perform_leaves_queued_messages_where_they_are(self, broker, job):
        job.send(1)
        perform(job, 2)
        assert job.done == [2]
        drain(broker)
        assert job.done == [2, 1]

    def test_a_perform_drops_the_messages_that_the_job_sends_and_its_dead_letter(self, broker, actor):
        @actor(max_retries=0)
        def job():
            job.send()
            raise ValueError

        assert perform(job).outcome == "dead"
        assert drain(broker).events == []
        assert broker.dead_letters == []

    def test_a_perform_names_the_argument_that_can_not_be_sent(self, job):
        with pytest.raises(TypeError, match=r"'number' of a message for actor 'job'.*is not JSON"):
            perform(job, {1, 2})

    def test_a_perform_whose_worker_dies_has_no_outcome(self, job):
        with crash(job), pytest.raises(AssertionError, match="worker died"):
            perform(job, 1)


def test_a_stub_broker_names_the_argument_that_can_not_be_sent_also_before_it_is_drained(job):
    with pytest.raises(TypeError, match=r"'number' of a message for actor 'job'.*is not JSON"):
        job.send(dt.date(2024, 5, 1))


def test_a_class_based_actor_fails_and_its_key_is_over_the_arguments_of_perform(broker, monkeypatch):
    monkeypatch.setattr("dramatiq.broker.global_broker", broker)

    class Pay(dramatiq.GenericActor):
        class Meta:
            retry_on = ConnectionError
            idempotency_key = "{order_id}"

        def perform(self, order_id):
            pass

    with fail(Pay, ConnectionError):
        Pay.send(1)
        assert drain(broker).outcomes(Pay) == ["retried", "succeeded"]
    with crash(Pay):
        Pay.send(2)
        assert drain(broker).outcomes("Pay") == ["succeeded"]
    Pay.send(2)
    assert drain(broker).outcomes(Pay) == ["duplicate"]


class TestWithoutTheBundle:
    """On a broker of which the kit knows nothing yet, or that has none of dramatiq_policies."""

    def test_a_job_can_not_hang(self):
        job = dramatiq.actor(lambda: None, actor_name="job", broker=StubBroker())
        with pytest.raises(ConfigurationError, match=r"no Timeout. Call install\(broker\) first"):
            hang(job)

    def test_there_is_no_store_that_could_be_down(self):
        with pytest.raises(ConfigurationError, match="no Idempotency with a store"), store_down(StubBroker()):
            pass

    def test_a_fault_is_put_in_its_function_and_taken_out_again(self):
        job = dramatiq.actor(lambda: "done", actor_name="job", broker=StubBroker())
        with fail(job, Flaky), pytest.raises(Flaky):
            job()
        assert job() == "done"


def test_a_job_that_is_called_directly_can_not_hang(actor):
    job = actor(lambda: None, actor_name="called", timeout=30_000)
    with hang(job), pytest.raises(RuntimeError, match="would hang forever"):
        job()


def test_a_message_without_a_timeout_can_not_hang(broker, job):
    job.send_with_options(args=(1,), timeout=float("inf"))
    with hang(job):
        run = drain(broker)
    assert "would hang forever" in str(run.events[-1].exception)


def test_a_broker_that_is_no_stub_loses_its_store_too(job):
    broker = RedisBroker(url="redis://127.0.0.1:1")
    install(broker, idempotency=Idempotency(MemoryStore()))
    ship = dramatiq.actor(lambda order_id: None, actor_name="ship", broker=broker, idempotency_key="{order_id}")
    with store_down(broker), pytest.raises(ConnectionError):
        Idempotency.state(ship, 7)
    assert Idempotency.state(ship, 7).state == "none"


def test_a_broker_s_own_enqueue_is_back_afterwards(job):
    broker = RedisBroker(url="redis://127.0.0.1:1")
    before = broker.enqueue
    with enqueue_down(broker), pytest.raises(ConnectionFailed):
        broker.enqueue(job.message(1))
    assert broker.enqueue == before
    assert "enqueue" not in vars(broker)
