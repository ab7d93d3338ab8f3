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
from redis.exceptions import NoScriptError
from redis.sentinel import Sentinel

from dramatiq_policies._redis import CommandBatcher, Script
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


def test_idle_connections_of_the_pool_leave_such_a_server_too():
    """A send in a job takes one of them, and would raise the server's refusal into the job."""
    batcher, pool = line_to(Server(replicas=1))
    idle = pool.make_connection()
    idle.connected = True
    pool._available_connections.append(idle)
    batcher.call("SET", "a", "b")
    assert not idle.connected


def test_where_its_name_still_leads_to_it_the_call_fails_and_the_next_one_connects_anew():
    server = Server(replicas=2)
    batcher, _ = line_to(server)
    with pytest.raises(redis.ReadOnlyError):
        batcher.call("SET", "a", "b")
    assert batcher.call("SET", "a", "b") == b"OK"


class Replies:
    """A connection that gives prepared replies, one for each command. An exception among the replies is raised."""

    def __init__(self, *replies):
        self.replies = list(replies)
        self.sent = []
        self.closed = 0

    def connect(self):
        pass

    def disconnect(self):
        self.closed += 1

    def pack_command(self, *command):
        return [" ".join(map(str, command)).encode()]

    def send_packed_command(self, data):
        self.sent.append(b"".join(data))

    def read_response(self, *, disable_decoding):
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply


WRONG_TYPE = redis.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value")
LOST = redis.ConnectionError("lost")
SCRIPT = Script("return 1")
CALL = SCRIPT.command([], [])


def replying(monkeypatch, *replies):
    """Return round trips over a connection with these replies, and the connection."""
    monkeypatch.setattr("dramatiq_policies._redis._pack", None)
    connection = Replies(*replies)
    pool = redis.ConnectionPool(connection_class=lambda **arguments: connection)
    return CommandBatcher(redis.Redis(connection_pool=pool)), connection


def test_only_the_script_that_redis_has_forgotten_is_sent_again(monkeypatch):
    """A batch has commands of many threads, and a repeated push would be a second message."""
    batcher, connection = replying(monkeypatch, b"1", NoScriptError("NOSCRIPT"), WRONG_TYPE, b"loaded")
    assert batcher.answers([("RPUSH",), CALL, ("GET",)]) == [b"1", b"loaded", WRONG_TYPE]
    assert connection.sent[1:] == [b"EVAL return 1 0"]


def test_only_the_command_that_a_demoted_server_refused_is_sent_again(monkeypatch):
    demoted = redis.ReadOnlyError("READONLY You can't write against a read only replica.")
    batcher, connection = replying(monkeypatch, b"1", WRONG_TYPE, demoted, b"OK")
    assert batcher.answers([("GET",), ("LPOP",), ("SET",)]) == [b"1", WRONG_TYPE, b"OK"]
    assert connection.sent[1:] == [b"SET"]


def test_a_new_master_that_has_no_scripts_yet_gets_the_text(monkeypatch):
    """The failover of a busy worker: the old master refuses the script, and the new master does not know the script."""
    demoted = redis.ResponseError("READONLY You can't write against a read only replica. script: 1")
    batcher, connection = replying(monkeypatch, demoted, NoScriptError("NOSCRIPT"), b"OK")
    assert batcher.call(*CALL) == b"OK"
    assert connection.sent[2:] == [b"EVAL return 1 0"]


def test_a_connection_lost_while_a_script_is_sent_again_leaves_the_reply_of_each_other_command(monkeypatch):
    """The thread of the other command has its reply: its claim is stored, and an error would have it wait for itself."""
    batcher, _ = replying(monkeypatch, b"claimed", NoScriptError("NOSCRIPT"), LOST, LOST)
    assert batcher.answers([("SET",), CALL]) == [b"claimed", LOST]


def test_a_connection_lost_twice_fails_all_commands_with_its_error_and_the_next_command_is_answered(monkeypatch):
    batcher, connection = replying(monkeypatch, LOST, LOST, b"OK")
    with pytest.raises(redis.ConnectionError, match="lost"):
        batcher.execute([("SET",), ("GET",)])
    assert connection.closed == 2
    assert batcher.call("GET") == b"OK"


def test_a_command_that_can_not_be_encoded_stops_no_other_and_shifts_no_reply(monkeypatch):
    def pack(command):
        if command == ("BAD",):
            raise redis.DataError("no bytes")
        return b"x"

    batcher, _ = replying(monkeypatch, b"1", b"2")
    monkeypatch.setattr("dramatiq_policies._redis._pack", pack)
    first, bad, last = batcher.answers([("FIRST",), ("BAD",), ("LAST",)])
    assert (first, str(bad), last) == (b"1", "no bytes", b"2")
    with pytest.raises(redis.DataError):
        batcher.call("BAD")


def test_answers_of_which_all_are_errors_raise_the_first(monkeypatch):
    """Callers take single errors for the answer of one queue: a server that refuses everything would look healthy."""
    batcher, _ = replying(monkeypatch, WRONG_TYPE, redis.ResponseError("another"))
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        batcher.answers([("GET",), ("SET",)])
    assert batcher.answers([]) == []


@pytest.mark.parametrize("error", [LOST, redis.TimeoutError("late"), OSError("unreachable")], ids=repr)
def test_a_connection_lost_once_costs_no_command(monkeypatch, error):
    batcher, connection = replying(monkeypatch, error, b"1", b"2")
    assert batcher.execute([("SET",), ("GET",)]) == [b"1", b"2"]
    assert connection.closed == 1


class ClusterClient:
    """Answers each command from a table, as a client of a cluster does: each key may be on another server."""

    def __init__(self, **replies):
        self.replies = replies
        self.sent = []

    def execute_command(self, *command, **options):
        self.sent.append(command[0])
        reply = self.replies[command[0]]
        if isinstance(reply, Exception):
            raise reply
        return reply


def test_a_cluster_that_refuses_one_command_answers_the_others_and_gives_the_reason():
    batcher = CommandBatcher(ClusterClient(GET=WRONG_TYPE, SET=b"OK"))
    assert batcher.answers([("GET",), ("SET",)]) == [WRONG_TYPE, b"OK"]
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        batcher.call("GET")


def test_a_cluster_that_has_forgotten_a_script_gets_the_text():
    client = ClusterClient(EVALSHA=NoScriptError("NOSCRIPT"), EVAL=b"1")
    assert CommandBatcher(client).call(*CALL) == b"1"
    assert client.sent == ["EVALSHA", "EVAL"]


def test_a_cluster_lost_before_the_last_command_leaves_the_replies_of_the_others():
    batcher = CommandBatcher(ClusterClient(SET=b"OK", GET=LOST))
    assert batcher.answers([("SET",), ("GET",)]) == [b"OK", LOST]


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
