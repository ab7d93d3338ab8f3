"""A store on Redis 6.2 or later, or Valkey.

Threads share round trips: whoever gets hold of the connection sends what all are waiting for, in one pipeline, as
databases do with commits (Gray and Reuter, *Transaction Processing*, 1993, "group commit"). No thread is added.
"""

from __future__ import annotations

import os
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from hashlib import blake2b, sha1
from importlib import resources
from threading import Lock
from typing import Any

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.client import NEVER_DECODE
    from redis.exceptions import NoScriptError
    from redis.retry import Retry
except ImportError as error:  # pragma: no cover
    raise ImportError('RedisStore needs redis: pip install "dramatiq-policies[redis]"') from error

from . import Entry, Renewal

__all__ = ["RedisStore"]

_SWAP = resources.files(__package__).joinpath("swap.lua").read_text()
_SWAP_SHA = sha1(_SWAP.encode(), usedforsecurity=False).hexdigest()
_RAW: dict[str, Any] = {NEVER_DECODE: []}
#: A register never holds this.
_NOTHING = b"\x00"
#: For how long one call may wait on a socket, in seconds, where the store makes the client.
_SOCKET_TIMEOUT = 1.0


class RedisStore:
    """Remembers on a Redis server: one string key per job, so that it works on a cluster.

    Run the server with ``maxmemory-policy noeviction`` and with persistence: a key that was evicted or lost is a second run.

    Parameters:
      client: Any client of redis-py (Sentinel's and cluster's too, decoding or not). Give it a ``socket_timeout``: a hung
        server holds up each job for as long. Default: a client of ``localhost:6379/0`` with one of 1 s.
      namespace: What its keys begin with. Default ``"idem"``. Keys are digests: they say nothing of the jobs' arguments.
    """

    def __init__(self, client: Any = None, *, namespace: str = "idem") -> None:
        self.client = redis.Redis(**_client_arguments()) if client is None else client
        self.namespace = namespace
        self._pid = 0
        self._batch: list[_Call] = []
        self._collecting, self._sending = Lock(), Lock()
        self._line: Any = None

    @classmethod
    def from_url(cls, url: str, *, namespace: str = "idem", **arguments: Any) -> RedisStore:
        """A store with a client of its own, whose sockets time out after 1 s unless an argument says otherwise."""
        return cls(redis.Redis.from_url(url, **{**_client_arguments(), **arguments}), namespace=namespace)

    @classmethod
    def beside(cls, client: Any, *, namespace: str = "idem") -> RedisStore:
        """A store on the same server as a client, with connections of its own that time out after 1 s."""
        pool = client.connection_pool
        arguments = {**pool.connection_kwargs, **_client_arguments()}
        if hasattr(pool, "service_name"):
            arguments.pop("connection_pool", None)
            return cls(redis.Redis(connection_pool=type(pool)(pool.service_name, pool.sentinel_manager, **arguments)))
        pool = redis.ConnectionPool(connection_class=pool.connection_class, **arguments)
        return cls(redis.Redis(connection_pool=pool), namespace=namespace)

    def swap(self, key: str, expected: bytes | None, value: bytes | None, ttl: int) -> Entry | None:
        name = self.name_of(key)
        if expected is None and value is not None:
            # By far the most frequent call, and cheaper without a script.
            if self._call("SET", name, value, "NX", "PX", ttl):
                return None
            expected = _NOTHING
        found = self._call("EVALSHA", _SWAP_SHA, 1, name, expected or b"", value or b"", ttl)
        return None if found is None else Entry(found[0] or None, max(0, found[1]))

    def put(self, key: str, value: bytes, ttl: int) -> None:
        self._call("SET", self.name_of(key), value, "PX", ttl)

    def get(self, key: str) -> Entry:
        found = self._call("EVALSHA", _SWAP_SHA, 1, self.name_of(key), _NOTHING, b"", 1)
        return Entry(found[0] or None, max(0, found[1]))

    def delete(self, key: str) -> bool:
        return bool(self._call("DEL", self.name_of(key)))

    def renew(self, renewals: Sequence[Renewal]) -> list[bool]:
        calls = [_Call(("EVALSHA", _SWAP_SHA, 1, self.name_of(key), value, value, ttl)) for key, value, ttl in renewals]
        self._send(calls)
        return [call.result() is None for call in calls]

    def warnings(self) -> list[str]:
        """What is wrong with how the server is set up, as sentences. Connects."""
        memory = self.client.info("memory")
        policy = memory.get("maxmemory_policy", "noeviction")
        if not memory.get("maxmemory") or policy == "noeviction":
            return []
        text = (
            f"The Redis server of the idempotency store may evict keys (maxmemory-policy {policy}): "
            "an evicted key is a second run. Set maxmemory-policy noeviction, or use another server."
        )
        return [text]

    def is_beside(self, client: Any) -> bool:
        """Whether a client reaches the same database of the same server, so that one script may touch both."""
        ours, theirs = (getattr(one, "connection_pool", None) for one in (self.client, client))
        if ours is None or theirs is None or hasattr(ours, "service_name") or hasattr(theirs, "service_name"):
            return False
        same = ("host", "port", "path", "db")
        return all(ours.connection_kwargs.get(name) == theirs.connection_kwargs.get(name) for name in same)

    def name_of(self, key: str) -> str:
        """The name of a register on the server."""
        return f"{self.namespace}:{urlsafe_b64encode(blake2b(key.encode(), digest_size=15).digest()).decode()}"

    def _call(self, *command: Any) -> Any:
        if self._pid != os.getpid():
            self._begin_anew()
        call = _Call(command)
        with self._collecting:
            self._batch.append(call)
        with self._sending:
            if not call.done:
                with self._collecting:
                    batch, self._batch = self._batch, []
                self._send(batch)
        return call.result()

    def _begin_anew(self) -> None:
        """In a new process no other thread waits, whatever the locks say."""
        self._pid = os.getpid()
        self._batch, self._line = [], None
        self._collecting, self._sending = Lock(), Lock()

    def _send(self, calls: list[_Call]) -> None:
        """Send all in one round trip; each gets its answer or its error."""
        try:
            self._exchange(calls)
            for call in calls:
                if isinstance(call.answer, NoScriptError):
                    # The server was restarted or flushed, or another is the master now. The text loads the script.
                    call.command = ("EVAL", _SWAP, *call.command[2:])
                    self._exchange([call])
        except Exception as error:
            for call in calls:
                call.answer = error
        finally:
            for call in calls:
                call.done = True

    def _exchange(self, calls: list[_Call]) -> None:
        if isinstance(self.client, redis.Redis):
            try:
                self._converse(calls)
            except (redis.ConnectionError, redis.TimeoutError, OSError):
                # One that has idled is often gone. Calls may be repeated.
                self._converse(calls)
            return
        for call in calls:  # A cluster's: each key has a server of its own.
            try:
                call.answer = self.client.execute_command(*call.command, **_RAW)
            except redis.ResponseError as error:
                call.answer = error

    def _converse(self, calls: list[_Call]) -> None:
        """On one connection, kept: a pipeline of the client's costs several times as much as what it sends."""
        if self._line is None:
            self._line = self.client.client()
        connection = self._line.connection
        try:
            connection.send_packed_command(connection.pack_commands([call.command for call in calls]))
            for call in calls:
                try:
                    call.answer = connection.read_response(disable_decoding=True)
                except redis.ResponseError as error:
                    call.answer = error
        except BaseException:
            # Whatever comes over it now is the answer to something else.
            connection.disconnect()
            raise


_UNANSWERED = redis.ConnectionError("the call was interrupted before it was answered")


class _Call:
    __slots__ = ("answer", "command", "done")

    def __init__(self, command: Sequence[Any]) -> None:
        self.command = command
        self.answer: Any = _UNANSWERED
        self.done = False

    def result(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def _client_arguments() -> dict[str, Any]:
    # One more try on a new connection: one that has idled is often gone. Calls may be repeated.
    return {
        "socket_timeout": _SOCKET_TIMEOUT,
        "socket_connect_timeout": _SOCKET_TIMEOUT,
        "retry": Retry(NoBackoff(), 1),
    }
