"""Shared round trips where nobody needs a server: who is interrupted while it waits, and a server that lost its rank."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import redis
from dramatiq.errors import ConnectionClosed
from redis.sentinel import Sentinel

from dramatiq_policies._redis import CommandBatcher
from dramatiq_policies.brokers.redis.queue_reader import own_client
from dramatiq_policies.idempotency.batched_completion import BatchedCompletions
from dramatiq_policies.stores.redis import RedisStore

PATIENCE = 20


class Interrupted(BaseException):
    pass


def test_a_thread_that_is_interrupted_while_it_waits_for_its_turn_gets_none(monkeypatch):
    """It would otherwise be handed the connection later, and all behind it wait for ever."""
    begun, go_on = threading.Event(), threading.Event()
    batcher = CommandBatcher(None)

    def exchange(calls):
        if not begun.is_set():
            begun.set()
            assert go_on.wait(PATIENCE)
        for call in calls:
            call.answer = call.command[0]

    monkeypatch.setattr(batcher, "_exchange", exchange)
    first = threading.Thread(target=batcher.call, args=("FIRST",))
    first.start()
    assert begun.wait(PATIENCE)

    struck = threading.Event()

    def raise_once(*args):
        if not struck.is_set():
            struck.set()
            raise Interrupted

    def interrupt_once_it_waits():
        while not batcher._waiting:
            time.sleep(0.001)
        # A signal just before the wait is handled after the wait only.
        while not struck.is_set():
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.001)

    before = signal.signal(signal.SIGUSR1, raise_once)
    try:
        interrupter = threading.Thread(target=interrupt_once_it_waits)
        interrupter.start()
        with pytest.raises(Interrupted):
            batcher.call("INTERRUPTED")
        interrupter.join(PATIENCE)
    finally:
        signal.signal(signal.SIGUSR1, before)
    go_on.set()
    first.join(PATIENCE)
    answered = []
    last = threading.Thread(target=lambda: answered.append(batcher.call("LAST")))
    last.start()
    last.join(PATIENCE)
    assert answered == ["LAST"]


class Server:
    """Resolves a server's name: at first to a demoted master."""

    def __init__(self, *, replicas):
        self.said = []
        self.replicas = replicas

    def connection(self, **arguments):
        return Connection(self)


class Connection:
    def __init__(self, server):
        self.server = server
        self.connected = False
        self.demoted = True

    def connect(self):
        if not self.connected:
            self.connected, self.demoted = True, self.server.replicas > 0
            self.server.replicas -= 1
            self.server.said.append("connect")

    def disconnect(self):
        self.connected = False
        self.server.said.append("disconnect")

    def pack_commands(self, commands):
        return []

    def send_packed_command(self, data):
        pass

    def read_response(self, *, disable_decoding):
        if self.demoted:
            raise redis.ReadOnlyError("You can't write against a read only replica.")
        return b"OK"


def line_to(server):
    """Round trips over a pool whose connections lead to it, and that pool."""
    pool = redis.ConnectionPool(connection_class=server.connection)
    client = redis.Redis(connection_pool=pool)
    return CommandBatcher(client), pool


def test_a_server_that_is_no_master_any_more_is_left_so_that_its_name_may_lead_to_the_next():
    server = Server(replicas=1)
    batcher, _ = line_to(server)
    assert batcher.call("SET", "a", "b") == b"OK"
    assert server.said == ["connect", "disconnect", "connect"]


def test_where_its_name_still_leads_to_it_the_call_fails_and_the_next_one_connects_anew():
    server = Server(replicas=2)
    batcher, _ = line_to(server)
    with pytest.raises(redis.ReadOnlyError):
        batcher.call("SET", "a", "b")
    assert batcher.call("SET", "a", "b") == b"OK"


# Against servers of its own: see tests/integration/test_failover.py.


@pytest.fixture
def settling(monkeypatch):
    """A Piggyback, and what it does with a message whose ack fails in these ways one after the other."""
    monkeypatch.setattr("dramatiq_policies.idempotency.batched_completion._ACK_AGAIN_AFTER", 0)
    batched_completions = BatchedCompletions(SimpleNamespace(stopping=threading.Event()), None)

    def settle(*errors):
        left = list(errors)
        tried = []

        def ack(state, message, delivery):
            tried.append(message.message_id)
            if left:
                raise left.pop(0)

        monkeypatch.setattr("dramatiq_policies.idempotency.batched_completion.settle_and_ack", ack)
        batched_completions._settle(SimpleNamespace(message_id="m1"), None)
        return len(tried)

    return settle


def test_a_completion_whose_ack_meets_a_lost_connection_is_acked_again_until_it_is_through(settling, caplog):
    assert settling(ConnectionClosed("gone"), ConnectionClosed("gone")) == 3
    assert caplog.text.count("Message m1 can't be acknowledged yet (gone)") == 2


def test_a_completion_whose_ack_fails_otherwise_is_logged_and_left_for_redelivery(settling, caplog):
    assert settling(ValueError("a fault")) == 1
    assert "Message m1 could not be acknowledged and will be redelivered." in caplog.text


# Clients of a Sentinel, which know a name in place of a server.


@pytest.fixture
def by_name():
    return Sentinel([("127.0.0.1", 1)]).master_for("shop", password="secret")


def test_a_client_that_resolves_a_service_name_is_beside_no_other_client(by_name):
    at_hand = redis.Redis()
    assert RedisStore(redis.Redis()).is_beside(at_hand)
    assert not RedisStore(redis.Redis()).is_beside(by_name)
    assert not RedisStore(by_name).is_beside(at_hand)


def test_a_client_of_our_own_asks_the_same_sentinels_for_the_same_name(by_name):
    pool = own_client(by_name).connection_pool
    assert pool is not by_name.connection_pool
    assert (pool.service_name, pool.sentinel_manager) == ("shop", by_name.connection_pool.sentinel_manager)
    assert (pool.connection_kwargs["socket_timeout"], pool.connection_kwargs["password"]) == (5, "secret")
