"""Connections to RabbitMQ that an exception from outside has struck are left without another word."""

from __future__ import annotations

import contextlib
import socket
from types import SimpleNamespace

import pika
import pytest
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.middleware import Shutdown

from dramatiq_policies import TimeoutExceeded
from dramatiq_policies._pika import drop
from dramatiq_policies.ops import OperationError
from dramatiq_policies.ops.piles.rabbitmq import connect
from dramatiq_policies.queues import reader_of

FROM_OUTSIDE = [KeyboardInterrupt, SystemExit, Shutdown, TimeoutExceeded]


class Connection:
    """As pika's, as far as it is looked at, to a server that takes note of how it ends."""

    def __init__(self):
        self.socket, self.server = socket.socketpair()
        self.said = []
        self.loops = [1]
        loop = SimpleNamespace(close=self.loops.clear)
        self._impl = SimpleNamespace(_transport=SimpleNamespace(_sock=self.socket), ioloop=loop)
        self.is_open = True
        self.strike = None

    def close(self):
        self.said.append("close")

    def channel(self):
        return self

    def queue_declare(self, name, passive):
        if self.strike:
            raise self.strike
        return SimpleNamespace(method=SimpleNamespace(message_count=0, consumer_count=0))

    def heard(self):
        """What the server was told, and whether the socket is closed."""
        self.server.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            return self.said, self.server.recv(1) == b""
        return self.said, False


@pytest.fixture
def connection(monkeypatch):
    connection = Connection()
    monkeypatch.setattr(pika, "BlockingConnection", lambda parameters: connection)
    yield connection
    connection.socket.close()
    connection.server.close()


@pytest.fixture
def broker():
    return RabbitmqBroker()


LEFT, CLOSED = ([], True), (["close"], False)


def test_what_is_dropped_has_no_socket_and_no_loop(connection):
    drop(connection)
    assert connection.heard() == LEFT
    assert not connection.loops


@pytest.mark.parametrize("inner", [None, SimpleNamespace(), SimpleNamespace(_transport=None)])
def test_a_connection_that_never_came_to_be_is_dropped_too(inner):
    drop(SimpleNamespace(_impl=inner))


def test_so_is_none_at_all():
    drop(None)


@pytest.mark.parametrize("error", FROM_OUTSIDE)
def test_a_command_that_is_interrupted_has_no_last_conversation(connection, broker, error):
    with pytest.raises(error), connect(broker):
        raise error
    assert connection.heard() == LEFT


def test_any_other_end_is_a_polite_one(connection, broker):
    with connect(broker):
        pass
    assert connection.heard() == CLOSED


@pytest.mark.parametrize(
    ("error", "raised"), [(ValueError, ValueError), (pika.exceptions.ChannelClosed(500, "no"), OperationError)]
)
def test_so_is_that_by_an_error(connection, broker, error, raised):
    with pytest.raises(raised), connect(broker):
        raise error
    assert connection.heard() == CLOSED


def test_so_is_that_of_whoever_has_seen_enough(connection, broker):
    def listed():
        with connect(broker):
            yield 1

    with contextlib.closing(listed()) as lines:
        next(lines)
    assert connection.heard() == CLOSED


@pytest.mark.parametrize("error", FROM_OUTSIDE)
def test_a_reading_that_is_interrupted_forgets_its_connection(connection, broker, error):
    reader = reader_of(broker)
    connection.strike = error
    with pytest.raises(error):
        reader.read("mail")
    reader.close()
    assert connection.heard() == LEFT


def test_a_reader_that_is_not_interrupted_keeps_its_connection_until_it_is_closed(connection, broker):
    reader = reader_of(broker)
    reader.read("mail")
    assert connection.heard() == ([], False)
    reader.close()
    assert connection.heard() == CLOSED
