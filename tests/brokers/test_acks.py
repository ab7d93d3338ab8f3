"""Acks of many threads share their way to RabbitMQ, and none is left behind."""

from __future__ import annotations

import threading
from queue import SimpleQueue

import pytest

from dramatiq_policies.brokers.rabbitmq.acks import SharedAcks


class Connection:
    """Makes its calls when it is told to, as pika's does in its own thread."""

    def __init__(self):
        self.calls = SimpleQueue()
        self.written, self.sent = [], []
        self.acks = SharedAcks(self, self.written.append, self.send)

    def add_callback_threadsafe(self, call):
        self.calls.put(call)

    def send(self, tag):
        self.sent += [*self.written, tag]
        self.written.clear()

    def work(self):
        made = 0
        while not self.calls.empty():
            self.calls.get()()
            made += 1
        return made


def test_acks_put_before_the_call_leave_with_the_call():
    connection = Connection()
    for tag in (3, 1, 2):
        connection.acks.put(tag)

    assert connection.work() == 1
    assert connection.sent == [3, 1, 2]
    assert not connection.written


def test_an_ack_put_after_the_call_leaves_with_the_next_call():
    connection = Connection()
    connection.acks.put(1)
    connection.work()
    connection.acks.put(2)

    assert connection.work() == 1
    assert connection.sent == [1, 2]


def test_an_ack_put_while_the_call_sends_is_sent_once():
    connection = Connection()
    send = connection.acks._send

    def put_another(tag):
        if tag == 1:
            connection.acks.put(2)
        send(tag)

    connection.acks._send = put_another
    connection.acks.put(1)
    connection.work()

    assert connection.sent == [1, 2]


def test_nothing_is_left_behind_by_many_threads():
    connection = Connection()
    threads = [
        threading.Thread(
            target=lambda first: [connection.acks.put(tag) for tag in range(first, 8_000, 8)], args=(first,)
        )
        for first in range(8)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        connection.work()
    connection.work()

    assert sorted(connection.sent) == list(range(8_000))
    assert not connection.written


def test_a_closed_connection_is_logged():
    class Closed(Exception):
        pass

    def refuse(call):
        raise Closed

    connection = Connection()
    connection.add_callback_threadsafe = refuse
    with pytest.raises(Closed):
        connection.acks.put(1)
