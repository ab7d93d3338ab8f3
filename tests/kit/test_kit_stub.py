"""`stub`: an app's actors on a StubBroker, and all restored at the end."""

from __future__ import annotations

import functools
import importlib
import sys

import dramatiq
import dramatiq.broker
import pytest
import redis.exceptions
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import Middleware
from dramatiq.rate_limits.backends import RedisBackend as RedisLimits
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from dramatiq_policies import (
    DiscardLogger,
    ErrorClassifier,
    Heartbeat,
    Idempotency,
    Metrics,
    QueueMonitor,
    RetryPolicy,
    SentryReporter,
    Threshold,
    Timeout,
    constant,
    install,
)
from dramatiq_policies.middleware.composition import GroupCallbacks
from dramatiq_policies.stores.redis import RedisStore
from dramatiq_policies.testing import drain, fail, perform, stub

from ..support import PlainClient

UNREACHABLE = "redis://127.0.0.1:1/0"


class Flaky(Exception):
    pass


@pytest.fixture(autouse=True)
def no_global_broker(monkeypatch):
    monkeypatch.setattr(dramatiq.broker, "global_broker", None)


@pytest.fixture
def redis_broker():
    broker = RedisBroker(url=UNREACHABLE)
    broker.add_middleware(Results(backend=RedisBackend(url=UNREACHABLE), store_results=True))
    broker.add_middleware(GroupCallbacks(RedisLimits(url=UNREACHABLE)))
    install(
        broker,
        error_classifier=ErrorClassifier(
            retry_on={Flaky: RetryPolicy(attempts=4, wait=constant(7))}, alert_on=MemoryError
        ),
        timeout=Timeout(default=1_234),
    )
    dramatiq.set_broker(broker)
    return broker


@pytest.fixture
def add(redis_broker):
    @dramatiq.actor(queue_name="sums")
    def add(x, y):
        return x + y

    return add


def test_a_stub_sends_no_metrics_and_starts_no_heartbeat(tmp_path):
    client, beats = PlainClient(), tmp_path / "alive"
    broker = RedisBroker(url=UNREACHABLE)
    install(broker, metrics=Metrics(client, prefix="shop"), heartbeat=Heartbeat(beats))
    job = dramatiq.actor(lambda: None, actor_name="job", broker=broker)
    with stub(broker) as stand_in:
        job.send()
        assert drain(stand_in).metrics["shop.job.success"] == 1
    assert client.calls == []
    assert not beats.exists()


def test_an_apps_actors_run_on_a_stub_broker_with_its_rules(add):
    with stub() as broker:
        assert isinstance(broker, StubBroker)
        assert dramatiq.get_broker() is broker is add.broker
        message = add.send(1, 2)
        with fail(add, Flaky):
            run = drain(broker)
        run.assert_outcomes(add, "retried", "succeeded")
        run.assert_waits(add, 7)
        assert message.get_result() == 3


def test_all_is_restored_also_when_the_test_raises(redis_broker, add):
    before = {name: value for name, value in vars(redis_broker).items() if name != "middleware"}
    fn, middleware = add.fn, list(redis_broker.middleware)
    with pytest.raises(ZeroDivisionError), stub():
        raise ZeroDivisionError
    assert dramatiq.get_broker() is add.broker is redis_broker
    assert add.fn is fn
    assert redis_broker.middleware == middleware
    assert {name: value for name, value in vars(redis_broker).items() if name != "middleware"} == before


def test_the_middleware_is_the_same_and_shares_nothing(redis_broker):
    class Own(Middleware):
        pass

    own = Own()
    redis_broker.add_middleware(own)
    with stub() as broker:
        assert [type(one) for one in broker.middleware] == [type(one) for one in redis_broker.middleware]
        ours = zip(broker.middleware, redis_broker.middleware, strict=True)
        assert {type(one) for one, its in ours if one is its} >= {Own}
        (timeout,) = [one for one in broker.middleware if isinstance(one, Timeout)]
        assert timeout.default == 1_234
        assert timeout.attached_to is not None


BUNDLE = [
    ErrorClassifier(max_attempts=7),
    Timeout(default=1_234),
    Idempotency(max_crashes=7),
    DiscardLogger("INFO"),
    Metrics(PlainClient(), prefix="tasks"),
    SentryReporter("first"),
    QueueMonitor(thresholds={"sums": Threshold(ready=7)}),
    Heartbeat("heartbeat"),
]


@pytest.mark.parametrize("original", BUNDLE, ids=lambda one: type(one).__name__)
def test_a_copy_for_a_test_has_the_settings_of_its_original_and_a_state_of_its_own(original):
    settings = {"_given", "levels", "_notifiers"}
    before = dict(vars(original))
    in_stub = original.for_stub()
    assert type(in_stub) is type(original)
    assert in_stub.attached_to is None
    assert vars(original) == before
    for name, value in vars(original).items():
        if isinstance(value, (dict, list, set)) and name not in settings:
            assert vars(in_stub)[name] is not value, name
        elif isinstance(value, (int, str, tuple)) and name != "in_workers":
            assert vars(in_stub)[name] == value, name


def test_a_subclass_of_our_middleware_may_define_its_copy_for_a_test(redis_broker, add):
    class Counting(Metrics):
        def __init__(self):
            super().__init__(PlainClient())
            self.counted = []

        def for_stub(self):
            in_stub = super().for_stub()
            in_stub.counted = []
            return in_stub

        def values_of(self, event):
            self.counted.append(event.outcome)
            return super().values_of(event)

    counting = Counting()
    redis_broker.add_middleware(counting)
    with stub() as broker:
        (in_stub,) = [one for one in broker.middleware if isinstance(one, Counting)]
        with fail(add, Flaky):
            add.send(1, 1)
            drain(broker)
    assert in_stub.counted[0] == "retried"
    assert counting.counted == []


def test_idempotency_remembers_in_memory_and_a_monitor_reads_the_stub(monkeypatch):
    redis = RedisBroker(url=UNREACHABLE)
    install(
        redis,
        queue_monitor=QueueMonitor(thresholds={"sums": Threshold(ready=2)}),
        idempotency=Idempotency(RedisStore.from_url(UNREACHABLE)),
    )

    @dramatiq.actor(broker=redis, queue_name="sums", idempotency_key="{x}")
    def once(x):
        pass

    for _ in range(2):
        with stub(redis) as broker:
            once.send(1)
            once.send(1)
            (monitor,) = [one for one in broker.middleware if isinstance(one, QueueMonitor)]
            assert [alert.queue for alert in monitor.check()] == ["sums"]
            drain(broker).assert_outcomes(once, "succeeded", "duplicate")


def test_the_state_of_one_stub_is_not_that_of_the_next(add):
    for _ in range(2):
        with stub() as broker:
            add.send(1, 1)
            assert len(drain(broker).events) == 1


def test_an_alert_in_one_stub_fires_again_in_the_next(add, caplog):
    for _ in range(2):
        with stub() as broker, fail(add, MemoryError):
            add.send(1, 1)
            drain(broker).assert_outcomes(add, "alerted")
    assert [record.levelname for record in caplog.records if "alerted" in record.getMessage()] == ["CRITICAL"] * 2


def test_messages_sent_through_the_app_s_own_broker_go_to_the_stub(redis_broker, add):
    with stub() as broker:
        pipe = dramatiq.pipeline([add.message(1, 2), add.message(3)], broker=redis_broker).run()
        redis_broker.enqueue(add.message(5, 5))
        group = dramatiq.group([add.message(1, 1)], broker=redis_broker).run()
        drain(broker).assert_outcomes(add, *["succeeded"] * 4)
        assert pipe.get_result() == 6
        assert list(group.get_results()) == [2]


def test_an_actor_that_is_declared_meanwhile_is_lent_too(redis_broker):
    with stub() as broker:

        @dramatiq.actor(broker=redis_broker)
        def late():
            pass

        late.send()
        drain(broker).assert_outcomes(late, "succeeded")
    assert late.broker is redis_broker
    assert "late" in redis_broker.actors


def test_another_than_the_global_broker_leaves_that_one_alone(redis_broker):
    other = install(RedisBroker(url=UNREACHABLE))

    @dramatiq.actor(broker=other)
    def job():
        pass

    with stub(other) as broker:
        assert dramatiq.get_broker() is redis_broker
        job.send()
        drain(broker).assert_outcomes(job, "succeeded")


def test_stubs_nest(add):
    with stub() as outer, stub() as inner:
        add.send(1, 2)
        assert drain(outer).events == []
        assert len(drain(inner).events) == 1


def test_without_a_global_broker_there_is_one_with_dramatiq_policies():
    with stub() as broker:

        @dramatiq.actor(retry_on=Flaky)
        def job():
            pass

        job.send()
        drain(broker).assert_outcomes(job, "succeeded")
    assert dramatiq.broker.global_broker is None


def test_a_global_broker_that_is_set_meanwhile_stays(redis_broker):
    with stub():
        own = StubBroker()
        dramatiq.set_broker(own)
    assert dramatiq.get_broker() is own


def test_perform_lends_an_actor_of_another_broker(add, redis_broker):
    assert perform(add, 1, 2).outcome == "succeeded"
    assert add.broker is redis_broker


def test_class_based_actors_are_lent_as_well(redis_broker):
    class Job(dramatiq.GenericActor):
        class Meta:
            retry_on = Flaky

        def perform(self, number):
            done.append(number)

    done = []
    with stub() as broker, fail(Job.__actor__, Flaky):
        Job.send(1)
        drain(broker).assert_outcomes("Job", "retried", "succeeded")
    assert done == [1]


def test_the_orders_app_is_tested_with_nothing_changed_in_it(monkeypatch):
    monkeypatch.setenv("BROKER_URL", UNREACHABLE)
    forget = functools.partial(sys.modules.pop, "examples.orders.app", None)
    forget()
    try:
        app = importlib.import_module("examples.orders.app")
        with stub() as broker:
            app.send_confirmation.send(7, "busy@example.com", "12.50 EUR")
            app.nightly_report("2024-05-01").run()
            run = drain(broker)
        run.assert_outcomes(app.send_confirmation, "retried", "succeeded")
        run.assert_outcomes(app.mail_report, "succeeded")
        assert len(app.gateway.sent) == 2
    finally:
        forget()


@pytest.fixture
def import_for_the_first_time(tmp_path, monkeypatch):
    """Import a module of this source, which nobody has imported yet."""
    names = []

    def first(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        names.append(name)
        return importlib.import_module(name)

    monkeypatch.syspath_prepend(tmp_path)
    yield first
    for name in names:
        del sys.modules[name]


JOBS = """
import dramatiq

@dramatiq.actor(retry_on=ConnectionError)
def job_of_a_module():
    pass

class ClassOfAModule(dramatiq.GenericActor):
    def perform(self):
        pass
"""


def test_jobs_of_a_module_that_is_imported_meanwhile_belong_to_the_apps_broker_afterwards(
    redis_broker, import_for_the_first_time
):
    with stub() as broker:
        jobs = import_for_the_first_time("jobs_of_an_app", JOBS)

        @dramatiq.actor
        def of_the_test():
            pass

        jobs.job_of_a_module.send()
        jobs.ClassOfAModule.send()
        assert drain(broker).outcomes() == ["succeeded", "succeeded"]
    assert jobs.job_of_a_module.broker is jobs.ClassOfAModule.__actor__.broker is redis_broker
    assert set(redis_broker.actors) == {"job_of_a_module", "ClassOfAModule"}
    for _ in range(2):
        with stub() as broker, fail(jobs.job_of_a_module, ConnectionError):
            jobs.job_of_a_module.send()
            drain(broker).assert_outcomes(jobs.job_of_a_module, "retried", "succeeded")


def test_jobs_of_a_module_imported_in_a_nested_stub_belong_to_the_apps_broker_afterwards(
    redis_broker, import_for_the_first_time
):
    with stub(), stub():
        jobs = import_for_the_first_time("jobs_of_an_app", JOBS)
    assert jobs.job_of_a_module.broker is redis_broker


APP = f"""
import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq_policies import install

broker = RedisBroker(url="{UNREACHABLE}")
install(broker)
dramatiq.set_broker(broker)

@dramatiq.actor
def job_of_an_app():
    pass
"""


def test_an_app_that_sets_its_broker_meanwhile_keeps_it_and_the_next_stub_has_its_jobs(import_for_the_first_time):
    with stub() as broker:
        app = import_for_the_first_time("app_with_a_broker", APP)
        with pytest.raises(redis.exceptions.ConnectionError):
            app.job_of_an_app.send()
        assert drain(broker).events == []
    assert dramatiq.get_broker() is app.job_of_an_app.broker is app.broker
    with stub() as broker:
        app.job_of_an_app.send()
        drain(broker).assert_outcomes(app.job_of_an_app, "succeeded")
    assert app.job_of_an_app.broker is app.broker


def test_a_broker_without_dramatiq_policies_is_lent_as_it_is():
    broker = StubBroker()
    dramatiq.set_broker(broker)
    sent = dramatiq.actor(lambda: None, actor_name="job")
    with stub() as stand_in:
        sent.send()
        assert stand_in.queues["default"].qsize() == 1
        assert {type(one) for one in stand_in.middleware} == {type(one) for one in broker.middleware}
    assert broker.queues["default"].qsize() == 0


def test_an_undeclared_actor_does_not_hide_the_argument_that_can_not_be_sent():
    broker = install(StubBroker())
    broker.declare_queue("default")
    with pytest.raises(TypeError, match=r"'0' of a message for actor 'nobody'.*is not JSON"):
        broker.enqueue(dramatiq.Message("default", "nobody", ({1, 2},), {}, {}))
