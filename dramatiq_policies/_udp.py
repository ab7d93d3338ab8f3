"""A ``statsd`` client over UDP that finds its server by itself and never waits."""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any

from .errors import ConfigurationError

__all__ = ["MAX_BYTES", "udp_client"]

#: The most that fits into one datagram on any Ethernet without being taken apart.
MAX_BYTES = 1_432
#: How many datagrams wait while the host is looked up; of more, the newest are kept.
_WAITING = 1_000
#: Seconds after which the host is looked up again, and after a failure.
_RESOLVED_FOR, _RESOLVE_AGAIN = 300.0, 30.0


def udp_client(say: Callable[[str, str], None]) -> Any:
    """A client for ``STATSD_HOST``/``STATSD_PORT``, localhost:8125 by default.

    ``say(what, text)`` logs what goes wrong, each ``what`` once.

    Raises:
      ImportError: The ``statsd`` package is not installed.
      ConfigurationError: ``STATSD_PORT`` is no port.
    """
    try:
        from statsd import StatsClient
    except ImportError as error:
        raise ImportError('Metrics needs the statsd package: pip install "dramatiq-policies[statsd]"') from error

    class UdpClient(_Udp, StatsClient):  # type: ignore[misc]
        pass

    port = os.environ.get("STATSD_PORT") or "8125"
    if not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ConfigurationError.of_option("Metrics", "STATSD_PORT", "a port in the environment, or nothing", port)
    return UdpClient(os.environ.get("STATSD_HOST") or "localhost", int(port), say)


class _Udp:
    """What ``statsd.StatsClient`` does with a socket, without its waits.

    That one's constructor looks the host up, and raises if it can't; its socket never says that nobody listens.
    """

    def __init__(self, host: str, port: int, say: Callable[[str, str], None]) -> None:
        self.host, self.port = host, port
        self.say = say
        # What StatsClient's own methods read.
        self._prefix = None
        self._maxudpsize = MAX_BYTES
        self._sock: socket.socket | None = None
        self._reset()

    def _reset(self) -> None:
        self.close()
        self._pid = os.getpid()
        self._waiting: deque[bytes] = deque(maxlen=_WAITING)
        self._resolving = threading.Lock()

    def close(self) -> None:
        """Close the socket; the next value opens another."""
        sock, self._sock = self._sock, None
        self._resolve_at = 0.0
        if sock is not None:
            sock.close()

    __del__ = close

    def deliver(self, values: Iterable[tuple[str, str, float, Any]]) -> None:
        """Send these values in as few datagrams as they need."""
        packet: list[str] = []
        size = 0
        for kind, name, value, _ in values:
            line = f"{name}:{value}|{kind}"
            size += len(line) + 1
            if size > MAX_BYTES and packet:
                self._send("\n".join(packet))
                packet, size = [], len(line) + 1
            packet.append(line)
        if packet:
            self._send("\n".join(packet))

    def _send(self, text: str) -> None:
        """Send what a method of StatsClient has formatted."""
        if self._pid != os.getpid():
            self._reset()
        if monotonic() >= self._resolve_at:
            self._resolve()
        data = text.encode("ascii", "replace")
        sock = self._sock
        if sock is not None:
            self._transmit(sock, data)
            return
        self._waiting.append(data)
        if self._sock is not None:
            self._transmit_waiting(self._sock)

    def _transmit(self, sock: socket.socket, data: bytes) -> None:
        try:
            sock.send(data)
        except BlockingIOError:
            pass
        except OSError as error:
            # A connected socket tells of the datagram before: nobody listened. This one is still to be sent.
            self._lost(error)
            try:
                sock.send(data)
            except OSError:
                pass

    def _transmit_waiting(self, sock: socket.socket) -> None:
        while self._waiting:
            try:
                data = self._waiting.popleft()
            except IndexError:  # Another thread was faster.
                return
            self._transmit(sock, data)

    def _resolve(self) -> None:
        """Look the host up: at once where it is an address, on a thread of its own where it is a name."""
        if not self._resolving.acquire(blocking=False):
            return
        self._resolve_at = monotonic() + _RESOLVED_FOR
        if _is_address(self.host):
            self._connect()
            return
        try:
            threading.Thread(target=self._connect, name="dramatiq_policies.statsd", daemon=True).start()
        except RuntimeError:  # The interpreter is about to end.
            self._resolving.release()

    def _connect(self) -> None:
        lock = self._resolving
        sock = self._sock
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_DGRAM)
            # As the statsd package: IPv4 where there is both.
            family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
            if sock is None:
                sock = socket.socket(family, kind, protocol)
                sock.setblocking(False)
            sock.connect(address)
            self._sock = sock
            self._transmit_waiting(sock)
        except Exception as error:  # Not only an OSError: a name that can't be one is a UnicodeError.
            self._resolve_at = monotonic() + _RESOLVE_AGAIN
            if sock is not None and sock is not self._sock:
                sock.close()
            self._lost(error)
        finally:
            lock.release()

    def _lost(self, error: Exception) -> None:
        self.say(
            "unreachable",
            f"No StatsD server can be reached at {self.host}:{self.port} ({error}); metrics are left out until there is.",
        )

    def flush(self, timeout: float) -> None:
        """Wait until the host was looked up, at most ``timeout`` seconds."""
        if self._waiting and self._resolving.acquire(timeout=timeout):
            self._resolving.release()


def _is_address(host: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
            return True
        except OSError:
            pass
    return False
