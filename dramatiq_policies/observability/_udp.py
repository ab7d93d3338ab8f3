"""A ``statsd`` client over UDP, with a lazy lookup of the server."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any

from ..errors import ConfigurationError

__all__ = ["MAX_BYTES", "udp_client"]

#: The largest datagram without fragmentation on Ethernet.
MAX_BYTES = 1_432
#: Seconds until the next lookup of the host, after a success and after a failure.
_RESOLVED_FOR, _RESOLVE_AGAIN = 300.0, 30.0


def udp_client(log: Callable[[str, str], None]) -> Any:
    """Return a client for ``STATSD_HOST``/``STATSD_PORT``. Default: localhost:8125.

    ``log(kind, text)`` logs a problem, each kind once.

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
    return UdpClient(os.environ.get("STATSD_HOST") or "localhost", int(port), log)


class _Udp:
    """Replaces the socket handling of ``statsd.StatsClient``. Used by a single thread.

    The constructor of ``StatsClient`` resolves the host, raises on failure, and its unconnected socket never reports a missing
    server.
    """

    def __init__(self, host: str, port: int, log: Callable[[str, str], None]) -> None:
        self.host, self.port = host, port
        self.log = log
        # Read by the methods of StatsClient.
        self._prefix = None
        self._maxudpsize = MAX_BYTES
        self._sock: socket.socket | None = None
        self._look_up_at = 0.0
        self._pid = os.getpid()

    def close(self) -> None:
        """Close the socket. The next value opens another socket."""
        sock, self._sock = self._sock, None
        self._look_up_at = 0.0
        if sock is not None:
            sock.close()

    __del__ = close

    def deliver_all(self, texts: Iterable[str]) -> None:
        """Send lines in as few datagrams as possible. The lines of one text share a datagram, if small enough."""
        packet: list[str] = []
        size = 0
        for text in texts:
            for part in (text,) if len(text) <= MAX_BYTES else text.split("\n"):
                size += len(part) + 1
                if size > MAX_BYTES + 1 and packet:
                    self._send("\n".join(packet))
                    packet, size = [], len(part) + 1
                packet.append(part)
        self._send("\n".join(packet))

    def _send(self, text: str) -> None:
        """Send a line formatted by StatsClient."""
        if self._pid != os.getpid():
            self.close()
            self._pid = os.getpid()
        if monotonic() >= self._look_up_at:
            self._look_up()
        sock = self._sock
        if sock is None:
            return
        data = text.encode("ascii", "replace")
        try:
            sock.send(data)
        except BlockingIOError:
            pass
        except OSError as error:
            # A connected socket reports the failure of the previous datagram. Send the current one again.
            self._lost(error)
            try:
                sock.send(data)
            except OSError:
                pass

    def _look_up(self) -> None:
        sock = self._sock
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_DGRAM)
            # Prefer IPv4, like the statsd package.
            family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
            if sock is None:
                sock = socket.socket(family, kind, protocol)
                sock.setblocking(False)
            sock.connect(address)
            self._sock = sock
            self._look_up_at = monotonic() + _RESOLVED_FOR
        except Exception as error:  # An invalid name raises UnicodeError, not OSError.
            self._look_up_at = monotonic() + _RESOLVE_AGAIN
            if sock is not None and sock is not self._sock:
                sock.close()
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        self.log(
            "unreachable",
            f"No StatsD server is reachable at {self.host}:{self.port} ({error}). Metrics are dropped "
            "until a server is reachable.",
        )
