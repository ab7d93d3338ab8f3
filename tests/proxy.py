"""A TCP proxy that breaks connections at a chosen moment, for tests against real servers.

    with Proxy("127.0.0.1", 6379) as proxy:             # or Proxy.before("redis://localhost:6379/7")
        client = redis.Redis(port=proxy.port)
        lost = proxy.cut_when(b"EVALSHA", after=True)   # the server runs it, the client never hears
        ...
        assert lost.wait()

One thread owns all sockets; every method is handed to that thread and returns when it has been carried out, so that
after ``cut()`` the connections are gone, and after ``refuse()`` the next one is refused. A proxy must be closed; it then
leaves neither thread nor socket behind.
"""

from __future__ import annotations

import re
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Match", "Proxy", "Trap", "amqp_method"]

Direction = Literal["to_server", "to_client"]

#: The bytes to look for: a string of bytes or a pattern, found also where two chunks meet, or a
#: callable that is given each chunk. The callable runs on the proxy's thread and may call the proxy's methods.
Match = bytes | re.Pattern[bytes] | Callable[[bytes], bool]

T = TypeVar("T")

_CHUNK = 65_536
_TAIL = 256  # the longest part of a match in earlier chunks
_LINGER = 5.0  # seconds that a peer has to close its side after ours was closed in order


def amqp_method(class_id: int, method_id: int) -> re.Pattern[bytes]:
    """A pattern for one AMQP 0-9-1 method frame: ``amqp_method(60, 40)`` is basic.publish, ``(60, 80)`` basic.ack."""
    return re.compile(rb"\x01.{6}" + re.escape(struct.pack("!HH", class_id, method_id)), re.DOTALL)


class Trap:
    """The condition of ``cut_when`` or ``stall_when``: says whether the moment has come."""

    def __init__(
        self,
        match: Match,
        direction: Direction,
        *,
        after: bool,
        action: Literal["cut", "stall"],
        reply: Match | None,
        grace: float,
        skip: int,
        times: int,
        refuse: bool,
    ) -> None:
        self.match = _matcher(match)
        self.direction = direction
        self.after = after
        self.action = action
        self.reply = None if reply is None else _matcher(reply)
        self.grace = grace
        self.skip = skip
        self.left = times
        self.refuse = refuse
        self.sprung = threading.Event()

    def wait(self, timeout: float = 10.0) -> bool:
        """Wait until it has been carried out; False if that took longer than ``timeout`` seconds."""
        return self.sprung.wait(timeout)


class _Stream:
    """The bytes that go one way on one connection."""

    __slots__ = ("direction", "eof", "pending", "shut", "sink", "source", "tail")

    def __init__(self, source: socket.socket, sink: socket.socket, direction: Direction) -> None:
        self.source = source
        self.sink = sink
        self.direction = direction
        self.pending = bytearray()
        self.tail = b""
        self.eof = False
        self.shut = False


class _Connection:
    __slots__ = ("awaiting", "client", "connected", "deadline", "down", "held", "server", "up")

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.up = _Stream(client, server, "to_server")
        self.down = _Stream(server, client, "to_client")
        self.connected = False
        self.held = False
        self.awaiting: Trap | None = None
        self.deadline = 0.0


class _Closing:
    """A socket that gets its last bytes and an orderly end, so that its peer has surely read them."""

    __slots__ = ("deadline", "pending", "shut", "sock")

    def __init__(self, sock: socket.socket, pending: bytearray) -> None:
        self.sock = sock
        self.pending = pending
        self.shut = False
        self.deadline = time.monotonic() + _LINGER


_Found = Callable[[_Stream, bytes], bool]


class Proxy:
    """Listens on a free local port and passes everything on to ``host:port``, until told otherwise.

    Attributes:
      port: The port that it listens on, the same from the first to the last.
      url: Its address; of the same form as the server's if made by :meth:`before`.
      cuts: How many connections it has cut, by ``cut()`` and by traps.
      accepted: How many connections it has taken.
    """

    def __init__(self, host: str, port: int) -> None:
        self.server_address = (host, port)
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        first = min(found, key=lambda info: info[0] != socket.AF_INET)
        self._family, self._address = first[0], first[4]
        self.host = "127.0.0.1"
        # The bound socket that never listens keeps the port ours while new connections are refused.
        self._reservation = _bound(self.host, 0)
        self.port: int = self._reservation.getsockname()[1]
        self.url = f"tcp://{self.host}:{self.port}"
        self.cuts = 0
        self.accepted = 0
        self._listener: socket.socket | None = None
        self._selector = selectors.DefaultSelector()
        self._waker, self._wakened = socket.socketpair()
        self._waker.setblocking(False)
        self._wakened.setblocking(False)
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._calls_lock = threading.Lock()
        self._connections: set[_Connection] = set()
        self._closings: set[_Closing] = set()
        self._traps: list[Trap] = []
        self._stalled: set[Direction] = set()
        self._error: BaseException | None = None
        self._running = True
        self._thread = threading.Thread(target=self._run, name=f"proxy-{self.port}", daemon=True)
        self._listen()
        self._thread.start()

    @classmethod
    def before(cls, url: str) -> Proxy:
        """A proxy in front of the server that ``url`` names; its own ``url`` differs in host and port alone."""
        parts = urlsplit(url)
        port = parts.port or {"redis": 6379, "amqp": 5672, "postgresql": 5432, "mariadb": 3306}[parts.scheme]
        proxy = cls(parts.hostname or "127.0.0.1", port)
        user = parts.netloc.rpartition("@")[0]
        proxy.url = parts._replace(netloc=f"{user}{'@' if user else ''}{proxy.host}:{proxy.port}").geturl()
        return proxy

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Cut what is left and end; raises what a predicate has raised."""
        if self._thread.is_alive():
            self._call(self._stop)
            self._thread.join(10)
            assert not self._thread.is_alive(), "the thread of the proxy does not end"
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    # ------------------------------------------------------------------ what tests call

    @property
    def connections(self) -> int:
        """How many connections are open through the proxy now."""
        return self._call(self._count)

    def cut(self) -> int:
        """Reset all current connections, on both sides; what is under way is lost. Returns how many."""
        return self._call(self._cut)

    def refuse(self) -> None:
        """Refuse new connections; those that exist go on."""
        self._call(self._unlisten)

    def lead_to(self, port: int) -> None:
        """Lead new connections to another server of this machine, as a virtual address does; those that exist stay."""
        self._address = ("127.0.0.1", port)

    def accept(self) -> None:
        """Take new connections again."""
        self._call(self._listen)

    def stall(self, direction: Direction | None = None) -> None:
        """Hold the bytes of all connections, new ones too: both ways, or ``"to_client"`` for the replies only.

        Nothing is lost: :meth:`resume` passes on what was held.
        """
        self._call(lambda: self._stalled.update(_both(direction)))

    def resume(self) -> None:
        """Let the bytes pass again that ``stall`` and ``stall_when`` hold."""
        self._call(self._resume)

    def cut_when(
        self,
        match: Match,
        direction: Direction = "to_server",
        *,
        after: bool = False,
        reply: Match | None = None,
        grace: float = 1.0,
        skip: int = 0,
        times: int = 1,
        refuse: bool = False,
    ) -> Trap:
        """Cut the connection at the moment when a chunk that matches passes.

        Parameters:
          match: What to look for in the bytes.
          direction: In the requests (``"to_server"``) or in the replies (``"to_client"``).
          after: False: the chunk is not passed on. True: it is, and nothing behind it. For a request that means that
            the connection is cut when the server's reply comes, which the client does not get: the server has done it,
            the client never hears.
          reply: For a request with ``after``: which of the server's bytes are its reply (default: the next that come).
            All of them are swallowed.
          grace: For a request with ``after``: seconds to wait for that reply, for requests that have none.
          skip: How many chunks that match pass first.
          times: How many connections to cut before the trap is used up.
          refuse: Refuse new connections from that moment on, until :meth:`accept`.

        The client sees a reset; the server gets an orderly end, so that it has read all that came before. A chunk is
        what one read brings, and may hold several commands.
        """
        return self._set(
            Trap(
                match,
                direction,
                after=after,
                action="cut",
                reply=reply,
                grace=grace,
                skip=skip,
                times=times,
                refuse=refuse,
            )
        )

    def stall_when(
        self, match: Match, direction: Direction = "to_server", *, after: bool = False, skip: int = 0, times: int = 1
    ) -> Trap:
        """Hold the bytes of the connection, both ways, from a chunk that matches on: with it, or ``after`` it."""
        return self._set(
            Trap(
                match,
                direction,
                after=after,
                action="stall",
                reply=None,
                grace=0,
                skip=skip,
                times=times,
                refuse=False,
            )
        )

    def disarm(self) -> None:
        """Take away all traps that have not sprung."""
        self._call(self._traps.clear)

    # ------------------------------------------------------------------ the proxy's own thread

    def _set(self, trap: Trap) -> Trap:
        self._call(lambda: self._traps.append(trap))
        return trap

    def _call(self, function: Callable[[], T]) -> T:
        if threading.current_thread() is self._thread:
            return function()
        future: Future[T] = Future()
        with self._calls_lock:
            if not self._running:
                raise RuntimeError("the proxy is closed")
            self._calls.append((future, function))
            try:
                self._waker.send(b"!")
            except BlockingIOError:
                pass  # it has been woken often enough
        return future.result()

    def _run(self) -> None:
        self._selector.register(self._wakened, selectors.EVENT_READ, self._wakened)
        try:
            while self._running:
                self._watch()
                for key, events in self._selector.select(self._next_deadline()):
                    if key.data is self._wakened:
                        self._wakened.recv(_CHUNK)
                    elif key.data is self._listener:
                        self._accept()
                    elif key.data in self._closings:
                        self._finish(key.data)
                    elif key.data in self._connections:
                        self._forward(key.data, key.fileobj, events)
                # Last, so that what had already arrived when the call was made has passed.
                while self._calls:
                    future, function = self._calls.popleft()
                    try:
                        future.set_result(function())
                    except Exception as error:
                        future.set_exception(error)
                self._expire()
        finally:
            self._tear_down()

    def _stop(self) -> None:
        with self._calls_lock:
            self._running = False

    def _tear_down(self) -> None:
        self._stop()
        self._unlisten()
        for connection in list(self._connections):
            self._drop(connection)
        for closing in self._closings:
            _reset(closing.sock)
        self._closings.clear()
        for sock in (self._reservation, self._waker, self._wakened):
            sock.close()
        self._selector.close()
        while self._calls:
            self._calls.popleft()[0].set_exception(RuntimeError("the proxy is closed"))

    def _listen(self) -> None:
        if self._listener is None:
            self._listener = _bound(self.host, self.port)
            self._listener.setblocking(False)
            self._listener.listen(128)

    def _unlisten(self) -> None:
        if self._listener is not None:
            self._accept()
            self._forget(self._listener)
            self._listener.close()
            self._listener = None

    def _accept(self) -> None:
        while self._listener is not None:
            try:
                client, _ = self._listener.accept()
            except (BlockingIOError, ConnectionError):
                return
            self.accepted += 1
            server = socket.socket(self._family, socket.SOCK_STREAM)
            for sock in (client, server):
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server.connect_ex(self._address)  # how it ends is seen when the socket can be written
            self._connections.add(_Connection(client, server))

    def _count(self) -> int:
        self._accept()
        return len(self._connections)

    def _cut(self) -> int:
        self._accept()
        connections = list(self._connections)
        for connection in connections:
            self._drop(connection)
        self.cuts += len(connections)
        return len(connections)

    def _resume(self) -> None:
        self._stalled.clear()
        for connection in self._connections:
            connection.held = False

    # The events of each socket; rebuilt on each turn, since there is only a handful of connections.

    def _watch(self) -> None:
        wanted: dict[socket.socket, tuple[int, object]] = {}
        if self._listener is not None:
            wanted[self._listener] = (selectors.EVENT_READ, self._listener)
        for connection in self._connections:
            if not connection.connected:
                wanted[connection.server] = (selectors.EVENT_WRITE, connection)
                continue
            for stream in (connection.up, connection.down):
                if connection.held or stream.direction in self._stalled:
                    continue
                reads = not stream.eof and len(stream.pending) < _CHUNK
                if reads and not (connection.awaiting and stream is connection.up):
                    events, _ = wanted.get(stream.source, (0, None))
                    wanted[stream.source] = (events | selectors.EVENT_READ, connection)
                if stream.pending:
                    events, _ = wanted.get(stream.sink, (0, None))
                    wanted[stream.sink] = (events | selectors.EVENT_WRITE, connection)
        for closing in self._closings:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if closing.pending else 0)
            wanted[closing.sock] = (events, closing)
        watched = {key.fileobj: key for key in self._selector.get_map().values() if key.fileobj is not self._wakened}
        for sock, key in watched.items():
            if sock not in wanted:
                self._selector.unregister(sock)
            elif wanted[sock] != (key.events, key.data):
                self._selector.modify(sock, *wanted[sock])
        for sock, (events, data) in wanted.items():
            if sock not in watched:
                self._selector.register(sock, events, data)

    def _next_deadline(self) -> float | None:
        deadlines = [closing.deadline for closing in self._closings]
        deadlines += [connection.deadline for connection in self._connections if connection.awaiting]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _expire(self) -> None:
        now = time.monotonic()
        for closing in [closing for closing in self._closings if closing.deadline <= now]:
            self._end(closing)
        for connection in list(self._connections):
            if connection.awaiting is not None and connection.deadline <= now:
                self._spring_cut(connection, connection.awaiting)

    def _forward(self, connection: _Connection, sock: object, events: int) -> None:
        if not connection.connected:
            connection.connected = not connection.server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if not connection.connected:
                self._drop(connection)
            return
        try:
            for stream in (connection.up, connection.down):
                if events & selectors.EVENT_READ and stream.source is sock:
                    self._read(connection, stream)
                if connection not in self._connections or connection.held:
                    return
                if events & selectors.EVENT_WRITE and stream.sink is sock:
                    _flush(stream.sink, stream.pending)
                if stream.eof and not stream.pending and not stream.shut:
                    stream.shut = True
                    stream.sink.shutdown(socket.SHUT_WR)
        except OSError:
            self._drop(connection)
            return
        if connection.up.shut and connection.down.shut:
            self._drop(connection, in_order=True)

    def _read(self, connection: _Connection, stream: _Stream) -> None:
        try:
            chunk = stream.source.recv(_CHUNK)
        except BlockingIOError:
            return
        awaiting = connection.awaiting
        if awaiting is not None:
            if not chunk or awaiting.reply is None or self._matches(awaiting.reply, stream, chunk):
                self._spring_cut(connection, awaiting)
            stream.tail = (stream.tail + chunk)[-_TAIL:]
            return
        if not chunk:
            stream.eof = True
            return
        trap = self._sprung_by(stream, chunk)
        if trap is None or trap.after or trap.action == "stall":
            stream.pending += chunk
        if trap is None or trap.after:
            _flush(stream.sink, stream.pending)
        if trap is not None:
            self._spring(connection, trap)

    def _sprung_by(self, stream: _Stream, chunk: bytes) -> Trap | None:
        found = None
        for trap in list(self._traps):
            if trap.direction != stream.direction or not self._matches(trap.match, stream, chunk):
                continue
            if trap.skip:
                trap.skip -= 1
            elif found is None:
                found = trap
                trap.left -= 1
                if not trap.left:
                    self._traps.remove(trap)
        stream.tail = (stream.tail + chunk)[-_TAIL:] if self._traps or found else b""
        return found

    def _matches(self, found: _Found, stream: _Stream, chunk: bytes) -> bool:
        try:
            return found(stream, chunk)
        except Exception as error:
            self._error = self._error or error
            return False

    def _spring(self, connection: _Connection, trap: Trap) -> None:
        if trap.action == "stall":
            connection.held = True
            trap.sprung.set()
        elif trap.after and trap.direction == "to_server":
            connection.awaiting = trap
            connection.deadline = time.monotonic() + trap.grace
            connection.down.tail = b""
        else:
            self._spring_cut(connection, trap)

    def _spring_cut(self, connection: _Connection, trap: Trap) -> None:
        if trap.refuse:
            self._unlisten()
        self._connections.discard(connection)
        self._linger(connection.server, connection.up.pending)
        if trap.direction == "to_client" and trap.after:
            self._linger(connection.client, connection.down.pending)
        else:
            self._forget(connection.client)
            _reset(connection.client)
        self.cuts += 1
        trap.sprung.set()

    def _linger(self, sock: socket.socket, pending: bytearray) -> None:
        closing = _Closing(sock, pending)
        self._closings.add(closing)
        self._finish(closing)

    def _finish(self, closing: _Closing) -> None:
        try:
            _flush(closing.sock, closing.pending)
            if not closing.pending and not closing.shut:
                closing.shut = True
                closing.sock.shutdown(socket.SHUT_WR)
            while closing.sock.recv(_CHUNK):
                pass
        except BlockingIOError:
            return
        except OSError:
            pass
        self._end(closing)

    def _end(self, closing: _Closing) -> None:
        self._closings.discard(closing)
        self._forget(closing.sock)
        _reset(closing.sock)

    def _drop(self, connection: _Connection, *, in_order: bool = False) -> None:
        self._connections.discard(connection)
        for sock in (connection.client, connection.server):
            self._forget(sock)
            if in_order:
                sock.close()
            else:
                _reset(sock)

    def _forget(self, sock: socket.socket) -> None:
        # The selector must not know a socket that is closed: its number will be given to another.
        if sock.fileno() >= 0 and sock in self._selector.get_map():
            self._selector.unregister(sock)


def _both(direction: Direction | None) -> tuple[Direction, ...]:
    return ("to_server", "to_client") if direction is None else (direction,)


def _matcher(match: Match) -> _Found:
    if callable(match):
        return lambda stream, chunk: bool(match(chunk))
    pattern = re.compile(re.escape(match)) if isinstance(match, bytes) else match

    def found(stream: _Stream, chunk: bytes) -> bool:
        known = len(stream.tail)
        return any(hit.end() > known for hit in pattern.finditer(stream.tail + chunk))

    return found


def _bound(host: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((host, port))
    return sock


def _flush(sock: socket.socket, pending: bytearray) -> None:
    while pending:
        try:
            sent = sock.send(pending)
        except BlockingIOError:
            return
        del pending[:sent]


def _reset(sock: socket.socket) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        pass  # its peer was faster
    sock.close()
