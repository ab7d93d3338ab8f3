"""A job that a shutdown interrupts comes back and uses up no attempt."""

from __future__ import annotations

import threading
import time

import pytest
from dramatiq import Worker
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import (
    Middleware,
    Retries,
    Shutdown,
    ShutdownNotifications,
)

from dramatiq_policies import Idempotency, RetryPolicy, constant
from dramatiq_policies.delivery.broker_state import state_of
from dramatiq_policies.stores.memory import MemoryStore

from ..support import Stage
from .scenarios import (
    PaymentError,
    always,
    failing,
    raw,
)


def test_a_job_that_shutdown_interrupts_is_requeued_and_has_used_no_attempt():
    stage = Stage(middleware=[], broker=StubBroker(middleware=[ShutdownNotifications(notify_shutdown=True), Retries()]))
    started = threading.Event()
    raised = []

    @stage.actor(retry_on={PaymentError: 1})
    def slow():
        started.set()
        deadline = time.monotonic() + 10
        try:
            while not raised and time.monotonic() < deadline:
                time.sleep(0.001)
        except Shutdown as error:
            raised.append(error)
            raise

    slow.send()
    with stage.working():
        assert started.wait(10)
    assert len(raised) == 1
    assert stage.outcomes()[0] == "interrupted"
    stage.run()
    assert stage.outcomes() == ["interrupted", "succeeded"]
    assert [event.attempt for event in stage.events] == [1, 1]


def test_a_message_that_waits_in_the_worker_does_not_begin_after_the_interrupt_of_the_job_before():
    class Slow(Middleware):
        """A hook that comes after the interrupt, and before Dramatiq stops the threads."""

        def before_worker_shutdown(self, broker, worker):
            deadline = time.monotonic() + 10
            (thread,) = worker.workers
            while thread.is_alive() and len(stage.events) < 2 and time.monotonic() < deadline:
                time.sleep(0.001)

    stage = Stage(broker=StubBroker(middleware=[ShutdownNotifications(notify_shutdown=True), Retries(), Slow()]))
    started = threading.Event()

    @stage.actor
    def slow():
        started.set()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and not stage.events:
            time.sleep(0.001)

    @stage.actor
    def waiting():
        pass

    slow.send()
    waiting.send()
    worker = Worker(stage.broker, worker_timeout=10, worker_threads=1)
    worker.start()
    assert started.wait(10)
    while not worker.work_queue.qsize():
        time.sleep(0.001)
    worker.stop()
    assert [(event.actor, event.outcome) for event in stage.events] == [("slow", "interrupted")]


def test_a_job_that_fails_during_a_shutdown_keeps_its_retry_and_its_callback():
    stage = Stage(bundle={"idempotency": Idempotency(MemoryStore())})
    runs, failures = [], []

    @stage.actor
    def record_failure(message, details):
        failures.append(details["type"])

    @stage.actor(
        idempotent=True, retry_on={PaymentError: RetryPolicy(attempts=2, wait=constant(0))}, on_failure=record_failure
    )
    def pay():
        runs.append(None)
        if len(runs) == 1:
            state_of(stage.broker).stopping.wait(10)
            raise PaymentError

    pay.send()
    with stage.working():
        while not runs:
            time.sleep(0.001)
    assert stage.outcomes() == ["retried"]
    stage.run()
    assert (len(runs), failures) == (2, ["PaymentError"])


@pytest.mark.parametrize("others", [[], [ShutdownNotifications()]])
def test_a_message_fetched_during_a_shutdown_is_left_for_the_next_worker(others):
    stage = Stage(broker=StubBroker(middleware=[*others, Retries()]))
    pay = failing(stage)
    with stage.working() as worker:
        stage.broker.emit_before("worker_shutdown", worker)
        pay.send()
        consumer = worker.consumers["default"].consumer
        deadline = time.monotonic() + 10
        while not (consumer.set_aside or stage.events) and time.monotonic() < deadline:
            time.sleep(0.005)
    assert stage.events == []
    assert stage.run().outcomes() == ["succeeded"]


def test_a_job_that_shutdown_interrupts_and_that_may_not_be_retried_is_dead():
    stage = Stage(middleware=[], broker=StubBroker(middleware=[ShutdownNotifications(notify_shutdown=True), Retries()]))
    always(stage, Shutdown(), max_retries=0).send()
    stage.run()
    assert (stage.outcomes(), stage.reasons()) == (["dead"], ["unclassified"])
    assert len(stage.dead) == 1


@pytest.mark.parametrize(
    ("classifier", "actor", "message", "outcome"),
    [
        (0, None, None, "dead"),
        (0, 1, None, "interrupted"),
        (1, 0, None, "dead"),
        (1, 0, 1, "interrupted"),
        (1, 1, 0, "dead"),
    ],
)
def test_whether_it_may_be_retried_the_message_says_before_its_actor_and_the_classifier(
    classifier, actor, message, outcome
):
    stage = Stage(max_retries=classifier)
    failing(stage, Shutdown(), **({} if actor is None else {"max_retries": actor}))
    raw(stage, options={} if message is None else {"max_retries": message})
    assert stage.run().outcomes()[0] == outcome
