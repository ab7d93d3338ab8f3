"""A store on Redis 6.2 or later, or Valkey."""

from __future__ import annotations

from base64 import urlsafe_b64encode
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.exceptions import NoPermissionError
    from redis.retry import Retry
except ImportError as error:  # pragma: no cover
    raise ImportError('RedisStore needs redis: pip install "dramatiq-policies[redis]"') from error

from .._redis import CommandBatcher, Script
from ..common.callables import is_coroutine_callable
from ..common.current import running_job
from ..errors import ConfigurationError
from . import Entry, Renewal

__all__ = ["RedisStore"]

_SWAP = Script(resources.files(__package__).joinpath("swap.lua").read_text())
#: For how long one call may wait on a socket, in seconds, where the store makes the client.
_SOCKET_TIMEOUT = 1.0


class _Namespace(str):
    """The namespace where none was given, which equals one of that name and is not the same."""

    __slots__ = ()


_DERIVED = _Namespace("idem")


class RedisStore:
    """Remembers on a Redis server: one string key per job, so that it works on a cluster.

    Run the server with ``maxmemory-policy noeviction`` and with persistence: a key that was evicted or lost is a second run.

    Parameters:
      client: Any client of redis-py (Sentinel's and cluster's too, decoding or not). Give it a ``socket_timeout``: a hung
        server holds up each job for as long. Default: a client of ``localhost:6379/0`` with one of 1 s.
      namespace: What its keys begin with. Give each service that shares the server a namespace of its own. Without one keys
        begin with ``"idem"``, and each is told apart from other services' by the broker's virtual host (or namespace) and
        the actor's queue. Keys are digests: they say nothing of the jobs' arguments.

    Raises:
      ConfigurationError: An argument makes no sense.
    """

    def __init__(self, client: Any = None, *, namespace: str = _DERIVED) -> None:
        command = getattr(client, "execute_command", None)
        if client is not None and (not callable(command) or is_coroutine_callable(command)):
            do = "RedisStore.from_url() takes a URL" if isinstance(client, str) else ""
            raise ConfigurationError.of_option(
                "RedisStore", "client", "a client of redis-py that is not async", client, do, secret=True
            )
        if namespace is not _DERIVED and (type(namespace) is not str or not namespace):
            raise ConfigurationError.of_option("RedisStore", "namespace", "a str that is not empty", namespace)
        self.client = redis.Redis(**_client_arguments()) if client is None else client
        #: Whether the namespace was given, and so tells services apart.
        self.is_namespaced = namespace is not _DERIVED
        self.namespace = str(namespace)
        #: What its calls share with one another, and with the acks of a Redis broker beside it.
        self.trips = CommandBatcher(self.client)

    @classmethod
    def from_url(cls, url: str, *, namespace: str = _DERIVED, **arguments: Any) -> RedisStore:
        """A store with a client of its own, whose sockets time out after 1 s unless an argument says otherwise.

        Raises:
          ConfigurationError: redis-py can't read the URL, or its password is not percent-encoded.
        """
        try:
            misread = "@" in urlsplit(url).path
            client = None if misread else redis.Redis.from_url(url, **{**_client_arguments(), **arguments})
        except Exception:  # Its text may be a part of the password.
            client = None
        if client is None:
            raise ConfigurationError.of_option(
                "RedisStore.from_url()",
                "url",
                "redis://user:password@host:port/db, its password percent-encoded (urllib.parse.quote)",
                url,
                secret=True,
            )
        return cls(client, namespace=namespace)

    @classmethod
    def beside(cls, client: Any, *, namespace: str = _DERIVED) -> RedisStore:
        """A store on the same server as a client, with connections of its own that time out after 1 s."""
        pool = client.connection_pool
        arguments = {**pool.connection_kwargs, **_client_arguments()}
        if hasattr(pool, "service_name"):
            arguments.pop("connection_pool", None)
            pool = type(pool)(pool.service_name, pool.sentinel_manager, is_master=pool.is_master, **arguments)
        else:
            pool = redis.ConnectionPool(connection_class=pool.connection_class, **arguments)
        return cls(redis.Redis(connection_pool=pool), namespace=namespace)

    def swap(self, key: str, expected: bytes | None, value: bytes | None, ttl: int) -> Entry | None:
        name = self.name_of(key)
        if expected is None and value is not None:
            # By far the most frequent call, and cheaper without a script.
            if self._call("SET", name, value, "NX", "PX", ttl, carries=True):
                return None
            return self._read(name)
        found = self._call(*_SWAP.command([name], [expected or b"", value or b"", ttl]), carries=True)
        return None if found is None else _entry(found)

    def put(self, key: str, value: bytes, ttl: int) -> None:
        self._call(*self.putting(key, value, ttl))

    def putting(self, key: str, value: bytes, ttl: int) -> tuple[Any, ...]:
        """The command that `put` calls."""
        return ("SET", self.name_of(key), value, "PX", ttl)

    def get(self, key: str) -> Entry:
        return _entry(self.trips.alone(*_SWAP.command([self.name_of(key)], ["read"])))

    def _read(self, name: str) -> Entry:
        return _entry(self._call(*_SWAP.command([name], ["read"])))

    def _call(self, *command: Any, carries: bool = False) -> Any:
        # A timeout of a job that asks must not reach its neighbours.
        if running_job() is not None:
            return self.trips.alone(*command)
        return self.trips.call(*command, carries=carries)

    def delete(self, key: str) -> bool:
        return bool(self.trips.alone("DEL", self.name_of(key)))

    def renew(self, renewals: Sequence[Renewal]) -> list[bool]:
        calls = [_SWAP.command([self.name_of(key)], [value, value, ttl]) for key, value, ttl in renewals]
        # One that is refused is not kept, and no error of the others.
        return [answer is None for answer in self.trips.answers(calls, carries=True)]

    def warnings(self) -> list[str]:
        """What is wrong with how the server is set up, as sentences. Connects."""
        try:
            memory = self.client.info("memory")
        except NoPermissionError:
            # A user with least rights may not ask. What such a user must be able to do is tried instead.
            self.get("")
            return []
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
        return f"{self.namespace}:{_digest(key)}"


def _entry(found: Any) -> Entry:
    return Entry(found[0] or None, max(0, found[1]))


@lru_cache(maxsize=1024)  # Each is wanted twice, for the claim and for the completion.
def _digest(key: str) -> str:
    return urlsafe_b64encode(blake2b(key.encode(), digest_size=15).digest()).decode()


def _client_arguments() -> dict[str, Any]:
    # One more try on a new connection: one that has idled is often gone. Calls may be repeated.
    return {
        "socket_timeout": _SOCKET_TIMEOUT,
        "socket_connect_timeout": _SOCKET_TIMEOUT,
        "retry": Retry(NoBackoff(), 1),
    }
