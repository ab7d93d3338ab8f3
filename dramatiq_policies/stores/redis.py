"""An idempotency store on Redis 6.2 or later, or Valkey."""

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

from .._redis import CommandBatcher, Script, scan
from ..common.callables import is_coroutine_callable
from ..common.current import running_job
from ..errors import ConfigurationError
from . import Entry, Renewal

__all__ = ["RedisStore"]

_SWAP, _PUT_BOTH = (
    Script(resources.files(__package__).joinpath(f"{name}.lua").read_text()) for name in ("swap", "put_both")
)
#: The socket timeout in seconds of clients made by the store.
_SOCKET_TIMEOUT = 1.0
#: The most keys of a database among which the store looks for its own.
_SEARCHED = 1_000_000


class _Namespace(str):
    """The type of the default namespace, to tell the default from an equal namespace of the user."""

    __slots__ = ()


_DERIVED = _Namespace("idem")


class RedisStore:
    """Keeps keys on a Redis server, one string key per job. Works on a cluster.

    Example::

        store = RedisStore.from_url("redis://cache:6379/0", namespace="billing")
        install(broker, idempotency=Idempotency(store))

    Run the server with ``maxmemory-policy noeviction`` and with persistence. After the loss of a key, a job may run twice.

    Parameters:
      client: Any client of redis-py, also for Sentinel or a cluster, with or without ``decode_responses``. Set a ``socket_timeout``:
        a hung server delays each job by the timeout. Default: a client of ``localhost:6379/0`` with a timeout of 1 s.
      namespace: The prefix of the keys. Default: ``"idem"``. Give each service on a shared server a different namespace. With the
        default, the virtual host (or namespace) of the broker and the queue of the actor keep the keys of services apart. Keys are
        digests, so Redis does not see the arguments of your jobs.

    Raises:
      ConfigurationError: An argument is invalid.
    """

    def __init__(self, client: Any = None, *, namespace: str = _DERIVED) -> None:
        command = getattr(client, "execute_command", None)
        if client is not None and (not callable(command) or is_coroutine_callable(command)):
            do = "RedisStore.from_url() takes a URL" if isinstance(client, str) else ""
            raise ConfigurationError.of_option(
                "RedisStore", "client", "a client of redis-py that is not async", client, do, secret=True
            )
        if namespace is not _DERIVED and (type(namespace) is not str or not namespace):
            raise ConfigurationError.of_option("RedisStore", "namespace", "a non-empty str", namespace)
        self.client = redis.Redis(**_client_arguments()) if client is None else client
        #: Whether the user gave a namespace, which tells services apart.
        self.is_namespaced = namespace is not _DERIVED
        self.namespace = str(namespace)
        #: Whether one step writes two registers: on a cluster, they may be on different servers.
        self.takes_companions = isinstance(self.client, redis.Redis)
        #: Batches the calls of all threads, and the acks of a Redis broker on the same server.
        self.batcher = CommandBatcher(self.client)

    @classmethod
    def from_url(cls, url: str, *, namespace: str = _DERIVED, **arguments: Any) -> RedisStore:
        """Make a store with a new client::

            RedisStore.from_url("redis://cache:6379/0", namespace="billing", socket_timeout=0.5)

        Parameters:
          url: As for ``redis.Redis.from_url``.
          namespace: See `RedisStore`.
          arguments: For ``redis.Redis.from_url``. Default: ``socket_timeout=1``, in seconds.

        Raises:
          ConfigurationError: redis-py can't parse the URL, or the password is not percent-encoded.
        """
        try:
            misread = "@" in urlsplit(url).path
            client = None if misread else redis.Redis.from_url(url, **{**_client_arguments(), **arguments})
        except Exception:  # The text may contain a part of the password.
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
        """Make a store on the server of ``client``, with separate connections and a timeout of 1 s."""
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
            # The most frequent call by far. Cheaper without a script.
            if self._call("SET", name, value, "NX", "PX", ttl, carries=True):
                return None
            return self._read(name)
        found = self._call(*_SWAP.command([name], [expected or b"", value or b"", ttl]), carries=True)
        return None if found is None else _entry(found)

    def put(self, key: str, value: bytes, ttl: int, *companion: Any) -> None:
        self._call(*self.putting(key, value, ttl, *companion))

    def putting(self, key: str, value: bytes, ttl: int, *companion: Any) -> tuple[Any, ...]:
        """Return the command of `put`. ``companion``: value and ttl of the register's companion, written in the same step."""
        name = self.name_of(key)
        if companion:
            return _PUT_BOTH.command([name, self.companion_of(name)], [value, ttl, *companion])
        return ("SET", name, value, "PX", ttl)

    def get(self, key: str) -> Entry:
        return _entry(self.batcher.call_alone(*_SWAP.command([self.name_of(key)], ["read"])))

    def get_companion(self, key: str) -> Entry:
        return _entry(self.batcher.call_alone(*_SWAP.command([self.companion_of(self.name_of(key))], ["read"])))

    def _read(self, name: str) -> Entry:
        return _entry(self._call(*_SWAP.command([name], ["read"])))

    def _call(self, *command: Any, carries: bool = False) -> Any:
        # An interrupt of this job must not fail the calls of other jobs.
        if running_job() is not None:
            return self.batcher.call_alone(*command)
        return self.batcher.call(*command, carries=carries)

    def delete(self, key: str) -> bool:
        return bool(self.batcher.call_alone("DEL", self.name_of(key)))

    def renew(self, renewals: Sequence[Renewal]) -> list[bool]:
        calls = [_SWAP.command([self.name_of(key)], [value, value, ttl]) for key, value, ttl in renewals]
        # A refused renewal counts as lost and does not fail the others.
        return [answer is None for answer in self.batcher.answers(calls, carries=True)]

    def is_empty(self) -> bool:
        """Return whether the namespace has no key. False if a search would take long, in a database of over a million keys."""
        try:
            return self.client.dbsize() <= _SEARCHED and next(scan(self.client, f"{self.namespace}:"), None) is None
        except NoPermissionError:
            return False

    def warnings(self) -> list[str]:
        """Return warnings about the configuration of the server. Connects."""
        try:
            memory = self.client.info("memory")
        except NoPermissionError:
            # Redis refuses INFO to users with least rights. Try a read instead.
            self.get("")
            return []
        policy = memory.get("maxmemory_policy", "noeviction")
        if not memory.get("maxmemory") or policy == "noeviction":
            return []
        text = (
            f"The Redis server of the idempotency store may evict keys (maxmemory-policy {policy}): after "
            "an eviction a job runs a second time. Set maxmemory-policy noeviction, or use another "
            "server."
        )
        return [text]

    def is_beside(self, client: Any) -> bool:
        """Return whether ``client`` uses the same database of the same server, so that a script can write to both."""
        ours, theirs = (getattr(one, "connection_pool", None) for one in (self.client, client))
        if ours is None or theirs is None or hasattr(ours, "service_name") or hasattr(theirs, "service_name"):
            return False
        same = ("host", "port", "path", "db")
        return all(ours.connection_kwargs.get(name) == theirs.connection_kwargs.get(name) for name in same)

    def name_of(self, key: str) -> str:
        """Return the Redis key of a register."""
        return f"{self.namespace}:{_digest(key)}"

    def companion_of(self, name: str) -> str:
        """Return the Redis key of a register's companion, from the Redis key of the register."""
        return f"{name}:arguments"


def _entry(found: Any) -> Entry:
    return Entry(found[0] or None, max(0, found[1]))


@lru_cache(maxsize=1024)  # Used twice per job: for the claim and for the completion.
def _digest(key: str) -> str:
    return urlsafe_b64encode(blake2b(key.encode(), digest_size=15).digest()).decode()


def _client_arguments() -> dict[str, Any]:
    # Retry once on a new connection, because idle connections are often closed. All calls are safe to repeat.
    return {
        "socket_timeout": _SOCKET_TIMEOUT,
        "socket_connect_timeout": _SOCKET_TIMEOUT,
        "retry": Retry(NoBackoff(), 1),
    }
