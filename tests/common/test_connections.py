"""A connection that an exception from outside has struck is thrown away: RabbitMQ's without another word, Redis' before its pool has it."""

from __future__ import annotations

import contextlib
import socket
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pika
import pytest
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.middleware import Shutdown

from dramatiq_policies import TimeoutExceeded, _dramatiq
from dramatiq_policies.brokers.rabbitmq.browser import connect
from dramatiq_policies.brokers.readers import reader_of
from dramatiq_policies.common.connections import close_when_interrupted, discard
from dramatiq_policies.ops import OperationError

LEFT, CLOSED = ([], True), (["close"], False)
FROM_OUTSIDE = [KeyboardInterrupt, SystemExit, Shutdown, TimeoutExceeded]


class Channel:
    is_open = True

    def __init__(self, connection):
        self.connection = connection

    def queue_declare(self, name, passive):
        if self.connection.strike:
            raise self.connection.strike
        return SimpleNamespace(method=SimpleNamespace(message_count=0, consumer_count=0))


class Connection:
    """As pika's, as far as it is looked at, to a server that takes note of how it ends."""

    strike = None

    def __init__(self):
        self.socket, self.server = socket.socketpair()
        self.said = []
        self.loops = [1]
        loop = SimpleNamespace(close=self.loops.clear)
        self._impl = SimpleNamespace(_transport=SimpleNamespace(_sock=self.socket), ioloop=loop)
        self.is_open = True

    def close(self):
        self.said.append("close")

    def channel(self):
        return Channel(self)

    def heard(self):
        """Return the commands that the server received, and whether the socket is closed."""
        self.server.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            return self.said, self.server.recv(1) == b""
        return self.said, False


@pytest.fixture
def connections(monkeypatch):
    """Those that were opened."""
    opened = []

    def connect(parameters):
        opened.append(Connection())
        return opened[-1]

    monkeypatch.setattr(pika, "BlockingConnection", connect)
    yield opened
    for one in opened:
        one.socket.close()
        one.server.close()


@pytest.fixture
def broker():
    return RabbitmqBroker()


def test_a_broker_that_gives_up_a_thread_s_connection_keeps_those_of_the_others(connections, broker):
    with ThreadPoolExecutor(1) as other:
        elsewhere = other.submit(lambda: (broker.connection, broker.channel)).result()
    struck = broker.connection
    assert broker.channel.connection is struck

    assert _dramatiq.take_rabbitmq_connection(broker) is struck
    assert broker.connections == {elsewhere[0]}
    assert broker.channels == {elsewhere[1]}
    assert broker.connection is connections[-1] is not struck
    assert broker.channel.connection is connections[-1]


def between_connection_and_channel(broker):
    assert broker.connection


def before_either_was_noted(broker):
    assert broker.channel
    broker.connections.clear()
    broker.channels.clear()


def while_the_channel_was_deleted(broker):
    assert broker.channel
    del broker.state.channel


@pytest.mark.parametrize(
    "struck", [between_connection_and_channel, before_either_was_noted, while_the_channel_was_deleted]
)
def test_a_connection_interrupted_while_the_broker_registers_it_is_forgotten(connections, broker, struck):
    struck(broker)
    assert _dramatiq.take_rabbitmq_connection(broker) is connections[0]
    assert (broker.connections, broker.channels, vars(broker.state)) == (set(), set(), {})


def test_a_thread_without_a_connection_has_none_to_give_up(broker):
    assert _dramatiq.take_rabbitmq_connection(broker) is None


def test_a_dropped_connection_has_no_socket_and_no_loop(connections, broker):
    connection = broker.connection
    discard(connection)
    assert connection.heard() == LEFT
    assert not connection.loops


@pytest.mark.parametrize("inner", [None, SimpleNamespace(), SimpleNamespace(_transport=None)])
def test_a_connection_that_never_came_to_be_is_dropped_too(inner):
    discard(SimpleNamespace(_impl=inner))


def test_a_missing_connection_is_dropped_without_an_error():
    discard(None)


@pytest.mark.parametrize("error", FROM_OUTSIDE)
def test_a_command_that_is_interrupted_has_no_last_conversation(connections, broker, error):
    with pytest.raises(error), connect(broker):
        raise error
    assert connections[0].heard() == LEFT


def test_a_command_that_ends_normally_closes_its_connection(connections, broker):
    with connect(broker):
        pass
    assert connections[0].heard() == CLOSED


@pytest.mark.parametrize(
    ("error", "raised"), [(ValueError, ValueError), (pika.exceptions.ChannelClosed(500, "no"), OperationError)]
)
def test_a_command_that_ends_by_an_error_closes_its_connection(connections, broker, error, raised):
    with pytest.raises(raised), connect(broker):
        raise error
    assert connections[0].heard() == CLOSED


def test_a_generator_closed_early_closes_its_connection(connections, broker):
    def listed():
        with connect(broker):
            yield 1

    with contextlib.closing(listed()) as lines:
        next(lines)
    assert connections[0].heard() == CLOSED


@pytest.mark.parametrize("error", FROM_OUTSIDE)
def test_a_reading_that_is_interrupted_forgets_its_connection(connections, broker, monkeypatch, error):
    reader = reader_of(broker)
    monkeypatch.setattr(Connection, "strike", error)
    with pytest.raises(error):
        reader.read("mail")
    reader.close()
    assert connections[0].heard() == LEFT


def test_a_reader_that_is_not_interrupted_keeps_its_connection_until_it_is_closed(connections, broker):
    reader = reader_of(broker)
    reader.read("mail")
    assert connections[0].heard() == ([], False)
    reader.close()
    assert connections[0].heard() == CLOSED


class Pool:
    """As redis-py's."""

    def __init__(self):
        self.back = []

    def release(self, connection):
        self.back.append(connection)


class Pooled:
    connected = True

    def disconnect(self):
        self.connected = False


def released(pool, error=None):
    one = Pooled()
    try:
        try:
            if error is not None:
                raise error
        finally:
            pool.release(one)
    except BaseException:
        pass
    return one


@pytest.fixture
def pool():
    pool = Pool()
    close_when_interrupted(pool)
    return pool


@pytest.mark.parametrize("error", FROM_OUTSIDE)
def test_a_pool_gets_a_connection_back_closed_after_an_exception_from_outside(pool, error):
    one = released(pool, error)
    assert not one.connected
    assert pool.back == [one]


@pytest.mark.parametrize("error", [None, ValueError, GeneratorExit])
def test_a_pool_gets_a_connection_back_open_after_any_other_end(pool, error):
    one = released(pool, error)
    assert one.connected
    assert pool.back == [one]


def test_a_pool_is_patched_once(pool):
    release = pool.release
    close_when_interrupted(pool)
    assert pool.release is release
