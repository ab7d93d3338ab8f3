"""Values on their way to a StatsD server: packed, never waited for, never the reason why anything fails."""

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
from ._datadog import Twin, can_have_twin
from ._udp import MAX_BYTES, udp_client

__all__ = ["Statsd", "Value", "metric_name", "tag_list"]

logger = SafeLogger("dramatiq_policies.outcomes")

#: Kind (``"c"`` to count, ``"ms"``, ``"g"`` for a gauge), name, value, and the tags, which a client without tags ignores.
Value = tuple[str, str, float, Sequence[str]]

#: How many calls' values wait for a thread of ours; more are left out.
_WAITING = 10_000
#: For how many seconds values wait for others to leave with.
_TOGETHER = 0.05
#: Seconds that a client may take before it is called on a thread of its own.
_SLOW = 0.05

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.\-]")
_NOT_IN_TAGS = re.compile(rf"[,|\s{UNPRINTABLE}]")


def metric_name(text: str | None) -> str:
    """A part of a metric's name: what StatsD would misread becomes ``_``; at most 200 characters."""
    return _NOT_IN_NAMES.sub("_", text)[:200] if text else "unknown"


def tag_list(tags: Mapping[str, str | None]) -> list[str]:
    """``["key:value", …]``, without those that have no value."""
    return [_NOT_IN_TAGS.sub("_", f"{key}:{value}") for key, value in tags.items() if value is not None]


class Statsd:
    """Sends values through a client of the user's, or over UDP to ``STATSD_HOST``/``STATSD_PORT``.

    A call returns without waiting for a server or a name, and never raises; the first thing that goes wrong is logged,
    once. Over UDP what comes within 50 ms leaves together, in datagrams of at most 1,432 bytes; the values of one call
    stay in one, if they fit. After a fork the child has a socket and a thread of its own. Nothing starts before the
    first call.

    Parameters:
      client: A ``statsd`` client (``incr``, ``timing``, ``gauge``, and ``pipeline`` if it can pack), a DogStatsD client
        (``increment``, ``timing`` or ``histogram``, ``gauge``, all with ``tags=``), or any object with these methods. Nothing of
        it is changed; beside one of ``datadog``'s, a client with the same settings packs the values. It
        is called where `send` is, but for one that may block (over TCP, or ``datadog``'s, which looks names up) and one
        that was slow once: those are called on a thread of their own. None, the default, for UDP.

    Attributes:
      tagged: Whether values get tags, rather than names that say it all.
      takes_text: Whether `send_text` may be used.

    Raises:
      ConfigurationError: The client has none of these methods, or ``STATSD_PORT`` is no port.
      ImportError: There is no client, and the ``statsd`` package is not installed.
    """

    def __init__(self, client: Any = None) -> None:
        self._said: set[str] = set()
        self._client: Any
        self.takes_text = client is None
        if client is None:
            self._client = udp_client(self._say)
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
        self._hurry = threading.Event()
        self._pid: int | None = None

    def send(self, values: Sequence[Value]) -> None:
        """Send these values. Returns at once, and never raises."""
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
                    self._say("slow", "The metrics client is slow; from now on it is called on a thread of its own.")
        except Exception as error:
            self._failed(error)

    def send_text(self, text: str) -> None:
        """`send` for lines that are written already, ``name:value|kind``; only where `takes_text`."""
        if self._pid == getpid() and self._waiting.qsize() < _WAITING:
            self._waiting.put(text)
            return
        try:
            self._put(text)
        except Exception as error:
            self._failed(error)

    def flush(self, timeout: float = 1.0) -> None:
        """Wait until what is under way has been sent, at most ``timeout`` seconds."""
        if self._pid == getpid():
            done = threading.Event()
            self._waiting.put(done)
            self._hurry.set()
            done.wait(timeout)

    def _put(self, item: str | Sequence[Value]) -> None:
        if self._pid != getpid():
            # No lock, for a fork may find it held. Each thread works off its own queue, should two start one here.
            self._waiting, self._hurry = queue.SimpleQueue(), threading.Event()
            self._pid = getpid()
            threading.Thread(
                target=self._work, args=(self._waiting, self._hurry), name="dramatiq_policies.statsd", daemon=True
            ).start()
        if self._waiting.qsize() < _WAITING:
            self._waiting.put(item)
        else:
            self._say("full", "Metrics come faster than they can be sent; what is too much is left out.")

    def _work(self, waiting: queue.SimpleQueue[Any], hurry: threading.Event) -> None:
        while True:
            batch: list[Any] = [waiting.get()]
            # What comes in the meantime wakes nobody, and shares a datagram.
            hurry.wait(_TOGETHER)
            hurry.clear()
            while not waiting.empty():
                batch.append(waiting.get())
            told = [item for item in batch if isinstance(item, threading.Event)]
            try:
                if len(batch) > len(told):
                    self._client.deliver_all([item for item in batch if not isinstance(item, threading.Event)])
            except Exception as error:
                self._failed(error)
            for event in told:
                event.set()

    def _failed(self, error: Exception) -> None:
        self._say("failed", f"Metrics can't be sent ({type(error).__name__}: {error}); they are left out.")

    def _say(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning("%s This is said once.", text)


def _may_block(client: Any) -> bool:
    return any(
        cls.__name__ == "StreamClientBase" or cls.__module__.partition(".")[0] == "datadog"
        for cls in type(client).__mro__
    )


class _Plain:
    """A client whose names say it all."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def deliver_all(self, batch: Iterable[Sequence[Value]]) -> None:
        self.deliver(itertools.chain.from_iterable(batch))

    def deliver(self, values: Iterable[Value]) -> None:
        client = self.client
        # Asked of its class: a mock has whatever it is asked for.
        if not hasattr(type(client), "pipeline"):
            self._call(client, values)
            return
        try:
            with client.pipeline() as pipe:
                if hasattr(pipe, "_maxudpsize"):
                    # A job's values stay together, however long its name.
                    pipe._maxudpsize = max(pipe._maxudpsize, MAX_BYTES)  # noqa: SLF001
                self._call(pipe, values)
        except OSError:
            if hasattr(client, "reconnect"):
                # A broken TCP connection stays broken until it is closed.
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
    """A DogStatsD client. The application may share it: nothing of it is called but the methods for values."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.twin = Twin(client) if can_have_twin(client) else None

    def deliver_all(self, batch: Iterable[Sequence[Value]]) -> None:
        self.deliver(itertools.chain.from_iterable(batch))

    def deliver(self, values: Iterable[Value]) -> None:
        if self.twin is None:
            self._call(self.client, values)
            return
        own = self.twin.get()
        own.open_buffer()
        try:
            self._call(own, values)
        finally:
            own.close_buffer()

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
