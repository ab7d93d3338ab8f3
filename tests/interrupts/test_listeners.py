"""Callables that run after each interrupt."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from dramatiq import Message

from dramatiq_policies.brokers.rabbitmq.publisher import ConfirmedPublisher
from dramatiq_policies.brokers.rabbitmq.transport import RabbitmqTransport
from dramatiq_policies.interrupts import listeners
from dramatiq_policies.interrupts.listeners import after_each_interrupt, notify_interrupt
from dramatiq_policies.interrupts.threads import run


@pytest.fixture(autouse=True)
def none_of_others(monkeypatch):
    monkeypatch.setattr(listeners, "_listeners", [])


def test_each_listener_is_called_once_and_an_error_stops_no_other(caplog):
    called = []

    def fails():
        raise RuntimeError("a bug")

    def listener():
        called.append(1)

    for one in (fails, listener, listener):
        after_each_interrupt(one)
    notify_interrupt()
    assert called == [1]
    assert "failed after the interrupt of a job" in caplog.text


def test_a_job_without_any_limit_that_an_abort_ends_closes_the_connections_it_may_have_hit():
    class Abort(BaseException):
        pass

    def job():
        raise Abort

    given_up = []
    with pytest.raises(Abort):
        run(job, (), {}, after_interrupt=lambda: given_up.append(1))
    with pytest.raises(KeyError):
        run({}.__getitem__, (1,), {}, after_interrupt=lambda: given_up.append(2))
    assert given_up == [1]


def test_on_rabbitmq_the_listeners_are_called_beside_the_drop_of_its_connection():
    called = []
    after_each_interrupt(lambda: called.append(1))
    broker = SimpleNamespace(state=SimpleNamespace(connection=None), connections=set(), channels=set())
    transport = object.__new__(RabbitmqTransport)
    transport.publisher = ConfirmedPublisher(broker, Message.encode)
    transport.after_interrupt()
    assert called == [1]
    assert not hasattr(broker.state, "connection")
