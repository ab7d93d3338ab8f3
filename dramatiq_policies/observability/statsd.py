"""Send values to a StatsD server: batched, without waiting, without failing a job."""

from __future__ import annotations

import itertools
import queue
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from os import getpid
from time import monotonic
from typing import Any

from ..common.safe_logger import SafeLogger
from ..common.texts import UNPRINTABLE
from ..errors import ConfigurationError
from ._datadog import PrivateClient, needs_private_client
from ._udp import MAX_BYTES, udp_client

__all__ = ["Statsd", "Value", "metric_name", "tag_list"]

logger = SafeLogger("dramatiq_policies.outcomes")

#: Kind (``"c"``: counter, ``"ms"``: timing, ``"g"``: gauge), name, value, tags. Clients without tags ignore the tags.
Value = tuple[str, str, float, Sequence[str]]

#: The limit of queued calls. Further values are dropped.
_WAITING = 10_000
#: Seconds to collect values for one datagram.
_COLLECT_FOR = 0.05
#: After a call longer than this (seconds), the client moves to a background thread.
_SLOW = 0.05

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.\-]")
_NOT_IN_TAGS = re.compile(rf"[,|\s{UNPRINTABLE}]")


def metric_name(text: str | None) -> str:
    """Return a safe part of a metric name: invalid characters become ``_``, at most 200 characters."""
    return _NOT_IN_NAMES.sub("_", text)[:200] if text else "unknown"


def tag_list(tags: Mapping[str, str | None]) -> list[str]:
    """Return ``["key:value", …]`` without empty values."""
    return [_NOT_IN_TAGS.sub("_", f"{key}:{value}") for key, value in tags.items() if value is not None]


class Statsd:
    """Sends values through the client of the user, or over UDP to ``STATSD_HOST``/``STATSD_PORT``.

    A call never waits for a server or a DNS lookup, and never raises. The first problem of each kind is logged once. Over UDP, all
    values of 50 ms share datagrams of at most 1,432 bytes, and the values of one call share one datagram, if small enough. A forked
    child uses a new socket and a new thread. The thread starts at the first call.

    Parameters:
      client: A ``statsd`` client (``incr``, ``timing``, ``gauge``, optionally ``pipeline``), a DogStatsD client (``increment``,
        ``timing`` or ``histogram``, ``gauge``, all with ``tags=``), or any object with these methods. The client is not changed. For
        a client of the ``datadog`` package, a second client with equal settings batches the values. The thread of the job calls
        the client, with two exceptions: clients that may block (TCP, or ``datadog``, which resolves names) and clients that
        were slow once run on a background thread. Default (None): UDP.

    Attributes:
      tagged: Whether values carry tags.
      takes_text: Whether `send_text` is available.

    Raises:
      ConfigurationError: The client lacks these methods, or ``STATSD_PORT`` is no port.
      ImportError: ``client`` is None, and the ``statsd`` package is not installed.
    """

    def __init__(self, client: Any = None) -> None:
        self._logged: set[str] = set()
        self._client: Any
        self.takes_text = client is None
        if client is None:
            self._client = udp_client(self._log)
        elif hasattr(client, "incr"):
            self._client = _Plain(client)
        elif hasattr(client, "increment"):
            self._client = _Tagged(client)
        else:
            raise ConfigurationError.of_option(
                "Metrics", "client", "a statsd or DogStatsD client, or None", client, secret=True
            )
        self.tagged = isinstance(self._client, _Tagged)
        self._apart = client is None or _may_block(client)
        self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._flush_now = threading.Event()
        self._pid: int | None = None

    def send(self, values: Sequence[Value]) -> None:
        """Send values. Returns at once and never raises."""
        try:
            if self.takes_text:
                self._put("\n".join([f"{name}:{value}|{kind}" for kind, name, value, _ in values]))
            elif self._apart:
                self._put(values)
            else:
                started = monotonic()
                self._client.deliver(values)
                if monotonic() - started > _SLOW:
                    self._apart = True
                    self._log("slow", "The metrics client is slow; from now on a separate thread calls it.")
        except Exception as error:
            self._failed(error)

    def send_text(self, text: str) -> None:
        """Send formatted lines, ``name:value|kind``. Requires `takes_text`."""
        if self._pid == getpid() and self._waiting.qsize() < _WAITING:
            self._waiting.put(text)
            return
        try:
            self._put(text)
        except Exception as error:
            self._failed(error)

    def flush(self, timeout: float = 1.0) -> None:
        """Wait until all queued values are sent, at most ``timeout`` seconds. Default: 1 s."""
        if self._pid == getpid():
            done = threading.Event()
            self._waiting.put(done)
            self._flush_now.set()
            done.wait(timeout)

    def _put(self, item: str | Sequence[Value]) -> None:
        if self._pid != getpid():
            # No lock, because a fork may happen while the lock is held. If two threads race here, each new thread has a separate queue.
            self._waiting, self._flush_now = queue.SimpleQueue(), threading.Event()
            self._pid = getpid()
            threading.Thread(
                target=self._work, args=(self._waiting, self._flush_now), name="dramatiq-policies-statsd", daemon=True
            ).start()
        if self._waiting.qsize() < _WAITING:
            self._waiting.put(item)
        else:
            self._log("full", "Metrics arrive faster than they can be sent; the excess is dropped.")

    def _work(self, waiting: queue.SimpleQueue[Any], flush_now: threading.Event) -> None:
        while True:
            batch: list[Any] = [waiting.get()]
            # Values of the next 50 ms wake no thread and share a datagram.
            flush_now.wait(_COLLECT_FOR)
            flush_now.clear()
            while not waiting.empty():
                batch.append(waiting.get())
            pending = [item for item in batch if isinstance(item, threading.Event)]
            try:
                if len(batch) > len(pending):
                    self._client.deliver_all([item for item in batch if not isinstance(item, threading.Event)])
            except Exception as error:
                self._failed(error)
            for event in pending:
                event.set()

    def _failed(self, error: Exception) -> None:
        self._log("failed", f"Metrics can't be sent ({type(error).__name__}: {error}) and are dropped.")

    def _log(self, kind: str, text: str) -> None:
        if kind not in self._logged:
            self._logged.add(kind)
            logger.warning("%s This warning is logged once.", text)


def _may_block(client: Any) -> bool:
    return any(
        cls.__name__ == "StreamClientBase" or cls.__module__.partition(".")[0] == "datadog"
        for cls in type(client).__mro__
    )


class _Plain:
    """Adapter of a client without tags."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def deliver_all(self, batch: Iterable[Sequence[Value]]) -> None:
        self.deliver(itertools.chain.from_iterable(batch))

    def deliver(self, values: Iterable[Value]) -> None:
        client = self.client
        # Checked on the class, because a mock has every attribute.
        if not hasattr(type(client), "pipeline"):
            self._call(client, values)
            return
        try:
            with client.pipeline() as pipe:
                if hasattr(pipe, "_maxudpsize"):
                    # Keep the values of a job in one datagram, even with a long name.
                    pipe._maxudpsize = max(pipe._maxudpsize, MAX_BYTES)  # noqa: SLF001
                self._call(pipe, values)
        except OSError:
            if hasattr(client, "reconnect"):
                # A broken TCP connection must be closed.
                client.close()
            raise

    @staticmethod
    def _call(client: Any, values: Iterable[Value]) -> None:
        for kind, name, value, _ in values:
            if kind == "c":
                client.incr(name) if value == 1 else client.incr(name, value)
            elif kind == "ms":
                client.timing(name, value)
            else:
                client.gauge(name, value)


class _Tagged:
    """Adapter of a DogStatsD client. The application may share the client, so only methods for values are called."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.private = PrivateClient(client) if needs_private_client(client) else None

    def deliver_all(self, batch: Iterable[Sequence[Value]]) -> None:
        self.deliver(itertools.chain.from_iterable(batch))

    def deliver(self, values: Iterable[Value]) -> None:
        if self.private is None:
            self._call(self.client, values)
            return
        client = self.private.get()
        client.open_buffer()
        try:
            self._call(client, values)
        finally:
            client.close_buffer()

    @staticmethod
    def _call(client: Any, values: Iterable[Value]) -> None:
        timing = getattr(client, "timing", None) or client.histogram
        for kind, name, value, tags in values:
            if kind == "c":
                counted = () if value == 1 else (value,)
                client.increment(name, *counted, tags=list(tags))
            elif kind == "ms":
                timing(name, value, tags=list(tags))
            else:
                client.gauge(name, value, tags=list(tags))
