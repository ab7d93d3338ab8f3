"""install() and the order of the middleware."""

from __future__ import annotations

import itertools
import time
from datetime import timedelta

import dramatiq
import pytest
from dramatiq import Message
from dramatiq.broker import MessageProxy
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import (
    Middleware,
    Retries,
)

from dramatiq_policies import (
    ConfigurationError,
    DiscardLogger,
    ErrorClassifier,
    Heartbeat,
    Idempotency,
    Metrics,
    QueueMonitor,
    RetryPolicy,
    Timeout,
    exponential,
    install,
)
from dramatiq_policies.testing import fail, perform

from ..support import Stage
from .scenarios import (
    PaymentError,
    always,
    failing,
    lines,
    outcomes_of,
)


def test_installing_twice_is_refused():
    broker = install(StubBroker())
    with pytest.raises(ConfigurationError, match="already"):
        install(broker)


@pytest.mark.parametrize("kind", [ErrorClassifier, Timeout, Idempotency, DiscardLogger])
def test_a_second_middleware_of_one_kind_is_refused_at_the_latest_at_the_first_declaration(kind):
    broker = StubBroker()
    broker.add_middleware(kind())
    with pytest.raises(ConfigurationError, match=kind.__name__):
        broker.add_middleware(kind())
        dramatiq.actor(lambda: None, actor_name="pay", broker=broker)


def test_a_second_middleware_of_one_kind_is_refused_at_the_latest_when_a_worker_boots():
    broker = StubBroker()
    broker.add_middleware(ErrorClassifier())
    broker.add_middleware(ErrorClassifier())
    with pytest.raises(ConfigurationError, match="ErrorClassifier"):
        broker.emit_before("worker_boot", None)


def test_a_subclass_of_a_middleware_is_of_its_kind():
    class Mine(Heartbeat):
        pass

    broker = install(StubBroker(), heartbeat=Mine())
    broker.add_middleware(Heartbeat())
    with pytest.raises(ConfigurationError, match="two Heartbeat"):
        dramatiq.actor(lambda: None, actor_name="pay", broker=broker)


def test_a_middleware_on_two_brokers_is_refused():
    classifier = ErrorClassifier()
    install(StubBroker(), error_classifier=classifier)
    with pytest.raises(ConfigurationError, match="another broker"):
        install(StubBroker(), error_classifier=classifier)


def test_an_argument_of_the_wrong_kind_is_refused():
    with pytest.raises(ConfigurationError, match=r"install\(\): timeout: expected a Timeout or None, got 30000"):
        install(StubBroker(), timeout=30_000)
    with pytest.raises(
        ConfigurationError, match=r"install\(\): heartbeat: expected a Heartbeat or None, got a Timeout"
    ):
        install(StubBroker(), heartbeat=Timeout())


def kinds(broker):
    return [type(middleware) for middleware in broker.middleware]


ORDERS = list(itertools.permutations([ErrorClassifier, Timeout, Idempotency, DiscardLogger]))


@pytest.mark.parametrize("order", ORDERS)
def test_middleware_added_singly_in_any_order_ends_in_the_same_list_as_install(order):
    broker = StubBroker()
    for kind in order:
        broker.add_middleware(kind())
    dramatiq.actor(lambda: None, actor_name="pay", broker=broker)
    assert kinds(broker) == kinds(install(StubBroker()))


@pytest.mark.parametrize("order", [o for o in ORDERS if o[0] is not ErrorClassifier])
def test_middleware_added_singly_after_declarations_works_with_a_later_classifier(order):
    one_at_a_time_after_an_actor(order)


@pytest.mark.parametrize("order", [o for o in ORDERS if o[0] is ErrorClassifier])
def test_middleware_added_singly_works_after_actors_were_declared(order):
    one_at_a_time_after_an_actor(order)


def one_at_a_time_after_an_actor(order):
    broker = StubBroker()
    dramatiq.actor(lambda: None, actor_name="early", broker=broker)
    for kind in order:
        broker.add_middleware(kind())
    dramatiq.actor(lambda: None, actor_name="pay", broker=broker, retry_on=PaymentError)
    assert kinds(broker) == kinds(install(StubBroker()))


@pytest.mark.parametrize("declared_before", [False, True], ids=["the first actor", "a later actor"])
@pytest.mark.parametrize("kind", [Timeout, Idempotency, DiscardLogger, Metrics, QueueMonitor, Heartbeat])
def test_a_middleware_without_a_classifier_gives_every_actor_its_rules(kind, declared_before):
    if kind is Metrics:
        pytest.importorskip("statsd")
    broker = StubBroker()
    broker.add_middleware(kind())
    if declared_before:
        dramatiq.actor(lambda: None, actor_name="early", broker=broker)
    pay = dramatiq.actor(lambda: None, actor_name="pay", broker=broker, discard_on=PaymentError, tags={"team": "shop"})
    with fail(pay, PaymentError):
        assert perform(pay).outcome == "discarded"


def test_the_settings_of_the_stock_middleware_are_kept():
    broker = StubBroker(middleware=[Retries(max_retries=3, min_backoff=5, max_backoff=50)])
    classifier = ErrorClassifier(max_backoff=70)
    install(broker, error_classifier=classifier)
    assert (classifier.max_retries, classifier.min_backoff, classifier.max_backoff) == (3, 5, 70)
    assert not any(type(middleware) is Retries for middleware in broker.middleware)


def test_the_stock_settings_are_dramatiqs_own_by_default():
    names = ("max_retries", "min_backoff", "max_backoff", "retry_when")
    ours, stock = ErrorClassifier(), Retries()
    assert [getattr(ours, name) for name in names] == [getattr(stock, name) for name in names]


def test_a_message_that_no_consumer_of_ours_has_delivered_is_retried_as_stock_does():
    stage = Stage()
    pay = failing(stage)
    stage.broker.emit_after("process_message", MessageProxy(pay.message()), exception=OSError("no"))
    (body,) = stage.broker.queues["default.DQ"].queue
    assert Message.decode(body).options["retries"] == 1
    assert stage.events == []


def test_our_hooks_before_and_around_such_a_message_let_it_pass(caplog):
    stage = Stage()
    message = MessageProxy(failing(stage).message())
    stage.broker.emit_before("process_message", message)
    stage.broker.emit_after("process_message", message, result=None)
    stage.broker.emit_after("skip_message", message)
    assert lines(caplog) == []
    assert not message.failed


def test_a_process_that_only_sends_needs_no_actor():
    broker = StubBroker()
    broker.declare_queue("default")
    broker.add_middleware(ErrorClassifier())
    broker.enqueue(Message("default", "of_another_app", (), {}, {"timeout": timedelta(seconds=5)}))
    (body,) = broker.queues["default"].queue
    options = Message.decode(body).options
    assert options["timeout"] == 5_000
    assert abs(options["ready_at"] - time.time() * 1_000) < 60_000


def test_stock_settings_given_to_the_classifier_are_its_own():
    stage = Stage(max_retries=1, min_backoff=1, max_backoff=2)
    always(stage, OSError()).send()
    assert stage.run().outcomes() == ["retried", "dead"]


def test_middleware_can_be_placed_by_the_names_of_the_stock_ones():
    class Mine(Middleware):
        pass

    broker = install(StubBroker())
    broker.add_middleware(Mine(), before=ErrorClassifier)
    assert kinds(broker).index(Mine) == kinds(broker).index(ErrorClassifier) - 1


def test_retry_when_of_the_stock_retries_keeps_its_meaning():
    stage = outcomes_of(OSError(), retry_when=lambda retries, error: retries < 1, min_backoff=1, max_backoff=2)
    assert stage.outcomes() == ["retried", "dead"]


def test_waits_grow_as_exponential_says():
    stage = Stage()
    policy = RetryPolicy(attempts=4, wait=exponential(initial=2, jitter=0))
    always(stage, PaymentError(), retry_on={PaymentError: policy}).send()
    assert [event.delay_ms for event in stage.run().events] == [2, 4, 8, None]
