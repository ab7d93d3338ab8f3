"""Connections after an interrupt: closed, with all that Django knew of them, and never used again."""

from __future__ import annotations

import threading
import time

import dramatiq
import pytest
from django.db import connection, connections, transaction
from dramatiq.brokers.stub import StubBroker

from dramatiq_policies import ErrorClassifier, RetryPolicy, TimeoutExceeded, constant, install
from dramatiq_policies.contrib.django.connections import close_interrupted_connections

from .project import DbConnectionsMiddleware

PATIENCE = 20


@pytest.fixture(autouse=True)
def no_connection_is_left():
    yield
    for alias in connections:
        if alias in {one.alias for one in connections.all(initialized_only=True)}:
            connections[alias].close()
            del connections[alias]


def one():
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        return cursor.fetchone()


def spin_for_ever():
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        pass


def work(broker):
    worker = dramatiq.Worker(broker, worker_timeout=10, worker_threads=1)
    worker.start()
    try:
        broker.join("default", fail_fast=False, timeout=PATIENCE * 1_000)
    finally:
        worker.stop()


@pytest.mark.parametrize("swallowed", [False, True])
def test_the_job_after_an_interrupt_gets_a_connection_of_its_own(swallowed):
    broker = StubBroker(middleware=[DbConnectionsMiddleware()])
    install(broker, error_classifier=ErrorClassifier(unclassified=RetryPolicy(attempts=2, wait=constant(0))))
    used = []

    @dramatiq.actor(broker=broker, timeout=1_000)
    def job(number):
        with transaction.atomic():
            one()
            used.append((threading.get_ident(), connections["default"].connection, connections["default"]))
            if number == 1 and len(used) == 1:
                try:
                    spin_for_ever()
                except TimeoutExceeded:
                    if not swallowed:
                        raise

    job.send(1)
    if swallowed:
        job.send(2)
    work(broker)
    (thread, driver_connection, wrapper), (thread_after, after, wrapper_after) = used
    assert thread == thread_after
    assert driver_connection is not after
    assert wrapper is not wrapper_after


def test_an_interrupt_while_a_transaction_ends_leaves_nothing_behind(monkeypatch):
    before = connections["default"]
    block = transaction.atomic()
    block.__enter__()
    one()
    close_interrupted_connections()
    assert connections["default"] is not before
    assert not connections["default"].in_atomic_block
    with transaction.atomic():
        assert one() == (1,)


def test_the_transaction_of_a_test_case_stays():
    block = transaction.atomic()
    block._from_testcase = True
    with block:
        before = connections["default"]
        one()
        close_interrupted_connections()
        assert connections["default"] is before
        assert one() == (1,)


def test_a_connection_that_does_not_close_cleanly_is_dropped(monkeypatch, caplog):
    one()
    before = connections["default"]
    driver_connection = before.connection
    monkeypatch.setattr(before, "_close", lambda: 1 / 0)
    close_interrupted_connections()
    assert connections["default"] is not before
    assert "did not close cleanly" in caplog.text
    driver_connection.close()
