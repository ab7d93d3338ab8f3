"""The proxy that breaks connections for other tests, shown against a server of a few lines."""

from __future__ import annotations

import os
import socket
import socketserver
import threading
from collections.abc import Iterator
from time import monotonic, sleep
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from tests.proxy import Proxy, amqp_method

if TYPE_CHECKING:
    from typing_extensions import Self

TIMEOUT = 10


class EchoServer(socketserver.ThreadingTCPServer):
    """Answers each line with the same line, and records all lines."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), EchoHandler)
        self.port: int = self.server_address[1]
        self.heard: list[bytes] = []
        self.changed = threading.Condition()
        self.open = 0

    def process_request(self, request: object, client_address: object) -> None:
        self._count(+1)
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def _count(self, change: int, line: bytes | None = None) -> None:
        with self.changed:
            self.open += change
            if line is not None:
                self.heard.append(line)
            self.changed.notify_all()

    def wait_for(self, *, heard: list[bytes] | None = None, connections: int | None = None) -> None:
        """Wait until the server has recorded exactly these lines, or has this number of connections."""
        with self.changed:
            assert self.changed.wait_for(
                lambda: (heard is None or self.heard == heard) and (connections is None or self.open == connections),
                TIMEOUT,
            ), (self.heard, self.open)


class EchoHandler(socketserver.StreamRequestHandler):
    server: EchoServer

    def handle(self) -> None:
        try:
            for line in self.rfile:
                self.server._count(0, line)
                if line != b"silence\n":
                    self.wfile.write(line)
        except ConnectionError:
            pass
        finally:
            self.server._count(-1)


def join(thread: threading.Thread) -> None:
    """Wait for the end of a thread. Fails if the thread goes on."""
    thread.join(TIMEOUT)
    assert not thread.is_alive(), f"{thread.name} does not end"


@pytest.fixture
def server() -> Iterator[EchoServer]:
    with EchoServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        join(thread)


@pytest.fixture
def proxy(server: EchoServer) -> Iterator[Proxy]:
    with Proxy("127.0.0.1", server.port) as proxy:
        yield proxy


class Client:
    """A connection that speaks in lines."""

    def __init__(self, proxy: Proxy) -> None:
        self.sock = socket.create_connection(("127.0.0.1", proxy.port), timeout=TIMEOUT)
        self.file = self.sock.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.file.close()
        self.sock.close()

    def send(self, line: bytes) -> None:
        self.sock.sendall(line)

    def ask(self, line: bytes) -> bytes:
        self.send(line)
        return self.file.readline()

    def assert_reset(self) -> None:
        with pytest.raises(ConnectionResetError):
            self.file.read(1)

    def assert_silent(self) -> None:
        self.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            self.sock.recv(1)
        self.sock.settimeout(TIMEOUT)


@pytest.fixture
def client(proxy: Proxy) -> Iterator[Client]:
    with Client(proxy) as client:
        yield client


def test_a_proxy_passes_everything_both_ways(client: Client, proxy: Proxy) -> None:
    assert client.ask(b"hello\n") == b"hello\n"
    assert (proxy.connections, proxy.accepted, proxy.cuts) == (1, 1, 0)


def test_a_proxy_passes_on_more_than_fits_into_any_buffer(client: Client) -> None:
    line = os.urandom(8_000_000).replace(b"\n", b"-") + b"\n"
    answers: list[bytes] = []
    reader = threading.Thread(target=lambda: answers.append(client.file.readline()), daemon=True)
    reader.start()
    client.send(line)
    join(reader)
    assert answers == [line]


def test_a_proxy_passes_on_the_end_of_one_direction_and_still_the_answers(
    client: Client, proxy: Proxy, server: EchoServer
) -> None:
    client.send(b"last words\n")
    client.sock.shutdown(socket.SHUT_WR)
    assert client.file.read() == b"last words\n"
    server.wait_for(connections=0)
    assert proxy.connections == 0


def test_keeps_the_servers_url_but_for_host_and_port(server: EchoServer) -> None:
    with Proxy.before(f"amqp://guest:secret@127.0.0.1:{server.port}/vhost?heartbeat=5") as proxy:
        assert proxy.url == f"amqp://guest:secret@127.0.0.1:{proxy.port}/vhost?heartbeat=5"
    with Proxy.before("redis://localhost/7") as proxy:
        assert proxy.server_address == ("localhost", 6379)
        assert proxy.url == f"redis://127.0.0.1:{proxy.port}/7"
    with Proxy("127.0.0.1", server.port) as proxy:
        assert urlsplit(proxy.url).port == proxy.port


def test_resets_a_client_whose_server_is_not_there(server: EchoServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with Proxy("127.0.0.1", port) as proxy:
        try:
            with Client(proxy) as client:
                client.assert_reset()
        except ConnectionResetError:
            pass  # It came while the client was still connecting.
        assert proxy.connections == 0


def test_cut_resets_all_connections_and_takes_new_ones(proxy: Proxy, server: EchoServer) -> None:
    with Client(proxy) as one, Client(proxy) as other:
        assert one.ask(b"1\n") == b"1\n"
        assert other.ask(b"2\n") == b"2\n"
        assert proxy.cut() == 2
        one.assert_reset()
        other.assert_reset()
        server.wait_for(connections=0)
    with Client(proxy) as again:
        assert again.ask(b"3\n") == b"3\n"
    assert proxy.cuts == 2


def test_cut_includes_a_connection_that_was_made_a_moment_ago(proxy: Proxy) -> None:
    with Client(proxy) as client:
        assert proxy.cut() == 1
        client.assert_reset()


def test_refuse_turns_new_connections_away_and_keeps_the_old(client: Client, proxy: Proxy) -> None:
    for _ in range(3):
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            Client(proxy)
        assert client.ask(b"still here\n") == b"still here\n"
        proxy.accept()
        with Client(proxy) as other:
            assert other.ask(b"back\n") == b"back\n"


def test_stall_holds_the_bytes_until_resume(client: Client, proxy: Proxy, server: EchoServer) -> None:
    proxy.stall()
    client.send(b"held\n")
    with Client(proxy) as late:
        late.send(b"late\n")
        assert proxy.connections == 2  # the proxy has taken a turn
        client.assert_silent()
        assert server.heard == []
        proxy.resume()
        assert client.file.readline() == b"held\n"
        assert late.file.readline() == b"late\n"


def test_stall_of_the_replies_lets_the_server_hear(client: Client, proxy: Proxy, server: EchoServer) -> None:
    proxy.stall("to_client")
    client.send(b"one way\n")
    server.wait_for(heard=[b"one way\n"])
    assert proxy.connections == 1
    client.assert_silent()
    proxy.resume()
    assert client.file.readline() == b"one way\n"


def test_a_client_that_gives_up_while_stalled_is_heard_of_at_resume(proxy: Proxy, server: EchoServer) -> None:
    proxy.stall()
    with Client(proxy) as client:
        client.send(b"never mind\n")
    assert proxy.connections == 1
    proxy.resume()
    server.wait_for(heard=[b"never mind\n"], connections=0)


def test_cut_ends_a_stalled_connection_and_drops_its_bytes(client: Client, proxy: Proxy, server: EchoServer) -> None:
    assert client.ask(b"before\n") == b"before\n"
    proxy.stall()
    client.send(b"held\n")
    assert proxy.cut() == 1
    proxy.resume()
    client.assert_reset()
    server.wait_for(heard=[b"before\n"], connections=0)


def test_cut_when_before_a_request_keeps_it_from_the_server(client: Client, proxy: Proxy, server: EchoServer) -> None:
    trap = proxy.cut_when(b"publish")
    assert client.ask(b"declare\n") == b"declare\n"
    assert not trap.sprung.is_set()
    client.send(b"publish\n")
    assert trap.wait()
    client.assert_reset()
    server.wait_for(heard=[b"declare\n"], connections=0)
    assert proxy.cuts == 1


def test_cut_when_after_a_request_has_it_done_and_swallows_the_reply(
    client: Client, proxy: Proxy, server: EchoServer
) -> None:
    trap = proxy.cut_when(b"publish", after=True)
    client.send(b"publish\n")
    assert trap.wait()
    assert server.heard == [b"publish\n"]
    client.assert_reset()
    server.wait_for(connections=0)
    assert proxy.cuts == 1


def test_cut_when_after_a_request_without_a_reply_waits_no_longer_than_grace(
    client: Client, proxy: Proxy, server: EchoServer
) -> None:
    trap = proxy.cut_when(b"silence", after=True, grace=0.05)
    client.send(b"silence\n")
    assert trap.wait()
    client.assert_reset()
    server.wait_for(heard=[b"silence\n"], connections=0)


def test_cut_when_after_a_request_swallows_all_up_to_the_reply_that_is_named(
    client: Client, proxy: Proxy, server: EchoServer
) -> None:
    trap = proxy.cut_when(b"publish", after=True, reply=b"confirm", grace=TIMEOUT)
    client.send(b"publish\nconfirm\n")
    assert trap.wait()
    assert server.heard == [b"publish\n", b"confirm\n"]
    client.assert_reset()


def test_cut_when_before_a_reply_keeps_it_from_the_client(client: Client, proxy: Proxy, server: EchoServer) -> None:
    trap = proxy.cut_when(b"deliver", "to_client")
    client.send(b"deliver\n")
    assert trap.wait()
    client.assert_reset()
    server.wait_for(heard=[b"deliver\n"], connections=0)


def test_cut_when_after_a_reply_ends_the_connection_behind_it(client: Client, proxy: Proxy, server: EchoServer) -> None:
    trap = proxy.cut_when(b"deliver", "to_client", after=True)
    client.send(b"deliver\n")
    assert trap.wait()
    assert client.file.read() == b"deliver\n"
    server.wait_for(connections=0)
    assert proxy.cuts == 1


def test_cut_when_cuts_only_the_connection_that_matches(client: Client, proxy: Proxy) -> None:
    with Client(proxy) as victim:
        trap = proxy.cut_when(b"publish")
        victim.send(b"publish\n")
        assert trap.wait()
    assert client.ask(b"publish\n") == b"publish\n"  # once, unless told otherwise


def test_cut_when_finds_a_match_spread_over_chunks(client: Client, proxy: Proxy) -> None:
    trap = proxy.cut_when(b"publish\n")
    for byte in b"publish":
        client.send(bytes([byte]))
        assert proxy.connections == 1  # the proxy has taken a turn
    client.send(b"\n")
    assert trap.wait()
    client.assert_reset()


def test_cut_when_skips_and_repeats(proxy: Proxy, server: EchoServer) -> None:
    proxy.cut_when(b"go", skip=1, times=2)
    with Client(proxy) as first, Client(proxy) as second, Client(proxy) as third:
        assert first.ask(b"go\n") == b"go\n"
        first.send(b"go\n")
        first.assert_reset()
        second.send(b"go\n")
        second.assert_reset()
        assert third.ask(b"go\n") == b"go\n"
    assert proxy.cuts == 2


def test_cut_when_refuses_the_next_connection_from_that_moment_on(client: Client, proxy: Proxy) -> None:
    trap = proxy.cut_when(b"publish", refuse=True)
    client.send(b"publish\n")
    assert trap.wait()
    with pytest.raises(ConnectionRefusedError):
        Client(proxy)
    proxy.accept()
    with Client(proxy) as again:
        assert again.ask(b"publish\n") == b"publish\n"


def test_cut_when_takes_a_callable_that_may_use_the_proxy(client: Client, proxy: Proxy) -> None:
    def third(chunk: bytes) -> bool:
        seen.append(chunk)
        return proxy.connections == 1 and len(seen) == 3

    seen: list[bytes] = []
    trap = proxy.cut_when(third)
    assert client.ask(b"1\n") == b"1\n"
    assert client.ask(b"2\n") == b"2\n"
    client.send(b"3\n")
    assert trap.wait()
    client.assert_reset()


def test_disarm_takes_the_traps_away(client: Client, proxy: Proxy) -> None:
    proxy.cut_when(b"publish")
    proxy.disarm()
    assert client.ask(b"publish\n") == b"publish\n"


def test_a_predicate_that_raises_fails_the_test_at_the_end(server: EchoServer) -> None:
    with pytest.raises(ZeroDivisionError), Proxy("127.0.0.1", server.port) as proxy, Client(proxy) as client:
        proxy.cut_when(lambda chunk: bool(1 / 0))
        assert client.ask(b"goes on\n") == b"goes on\n"


def test_stall_when_holds_a_request_and_resume_lets_it_pass(client: Client, proxy: Proxy, server: EchoServer) -> None:
    trap = proxy.stall_when(b"publish")
    client.send(b"publish\n")
    assert trap.wait()
    assert server.heard == []
    with Client(proxy) as other:
        assert other.ask(b"not stalled\n") == b"not stalled\n"
    proxy.resume()
    assert client.file.readline() == b"publish\n"


def test_stall_when_after_a_request_holds_the_reply(client: Client, proxy: Proxy, server: EchoServer) -> None:
    trap = proxy.stall_when(b"publish", after=True)
    client.send(b"publish\n")
    assert trap.wait()
    server.wait_for(heard=[b"publish\n"])
    assert proxy.connections == 1
    client.assert_silent()
    proxy.resume()
    assert client.file.readline() == b"publish\n"


def test_an_amqp_method_is_found_in_its_frame_only() -> None:
    publish = amqp_method(60, 40)
    assert publish.search(b"\x01\x00\x01\x00\x00\x00\x0d\x00\x3c\x00\x28\x00\x00")
    assert not publish.search(b"\x01\x00\x01\x00\x00\x00\x0d\x00\x3c\x00\x50\x00\x00")
    assert not publish.search(b"\x00\x3c\x00\x28")


def test_many_connections_and_cuts_leave_no_thread_and_no_socket(server: EchoServer) -> None:
    def talk() -> None:
        while not over.is_set():
            try:
                with Client(proxy) as client:
                    while client.ask(b"hello\n") == b"hello\n" and not over.is_set():
                        talks.release()
            except OSError:
                pass

    before = _threads_and_sockets()
    over, talks = threading.Event(), threading.Semaphore(0)
    with Proxy("127.0.0.1", server.port) as proxy:
        talkers = [threading.Thread(target=talk, daemon=True) for _ in range(32)]
        for talker in talkers:
            talker.start()
        for _ in range(20):
            for _ in range(32):
                assert talks.acquire(timeout=TIMEOUT)
            proxy.cut()
        over.set()
        proxy.cut()
        for talker in talkers:
            join(talker)
    assert proxy.cuts > 20
    server.wait_for(connections=0)
    with pytest.raises(RuntimeError, match="closed"):
        proxy.cut()
    proxy.close()
    for thread in threading.enumerate():
        if "process_request" in thread.name:
            thread.join(TIMEOUT)
    # Threads of this or an earlier test may take a moment to end, and only lower the numbers.
    ends = monotonic() + TIMEOUT
    while any(now > then for now, then in zip(_threads_and_sockets(), before, strict=True)):
        assert monotonic() < ends, (_threads_and_sockets(), before)
        sleep(0.01)


def test_closing_resets_open_connections_and_frees_the_port(server: EchoServer) -> None:
    proxy = Proxy("127.0.0.1", server.port)
    with Client(proxy) as client:
        assert client.ask(b"hello\n") == b"hello\n"
        proxy.close()
        client.assert_reset()
    with pytest.raises(ConnectionRefusedError):
        Client(proxy)
    server.wait_for(connections=0)


def _threads_and_sockets() -> tuple[int, int]:
    descriptors = 0
    for number in range(1_024):
        try:
            os.fstat(number)
        except OSError:
            continue
        descriptors += 1
    return threading.active_count(), descriptors
