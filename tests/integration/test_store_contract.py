"""RedisStore passes the contract: over a client that decodes, one that does not, Sentinel's kind of pool, and a cluster."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.cluster import RedisCluster

from dramatiq_policies.stores.redis import RedisStore
from dramatiq_policies.testing import IdempotencyStoreContract

from .places import until


class OnRedis(IdempotencyStoreContract):
    busy = 4

    def test_it_is_empty_until_it_has_a_key(self, store: RedisStore) -> None:
        assert store.is_empty()
        store.put("k", b"one", 60_000)
        assert not store.is_empty()


class TestOverAClientThatDoesNotDecode(OnRedis):
    @pytest.fixture
    def store(self, redis_url: str, redis_namespace: str) -> Iterator[RedisStore]:
        with redis.Redis.from_url(redis_url) as client:
            yield RedisStore(client, namespace=redis_namespace)


class TestOverAClientThatDecodes(OnRedis):
    @pytest.fixture
    def store(self, redis_url: str, redis_namespace: str) -> Iterator[RedisStore]:
        with redis.Redis.from_url(redis_url, decode_responses=True) as client:
            yield RedisStore(client, namespace=redis_namespace)


class TestWithoutHiredis(OnRedis):
    @pytest.fixture
    def store(self, redis_url: str, redis_namespace: str, monkeypatch: pytest.MonkeyPatch) -> RedisStore:
        monkeypatch.setattr("dramatiq_policies._redis._pack", None)
        return RedisStore.from_url(redis_url, namespace=redis_namespace)


class TestMadeFromAUrl(OnRedis):
    @pytest.fixture
    def store(self, redis_url: str, redis_namespace: str) -> RedisStore:
        return RedisStore.from_url(redis_url, namespace=redis_namespace)


@pytest.fixture(scope="module")
def cluster_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A cluster of one server."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed: a cluster needs a server of its own")
    folder: Path = tmp_path_factory.mktemp("cluster")
    port = free_port()
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--cluster-enabled", "yes", "--cluster-port", str(free_port())], stdout=log, stderr=log
        )
    try:
        with redis.Redis(port=port) as client:
            until(lambda: pings(client))
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16_383)
            until(lambda: b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO", NEVER_DECODE=[]))
        yield port
    finally:
        server.terminate()
        server.wait(10)


def pings(client: Any) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class TestOverAClustersClient(OnRedis):
    @pytest.fixture
    def store(self, cluster_port: int) -> Iterator[RedisStore]:
        with RedisCluster(host="127.0.0.1", port=cluster_port) as client:
            client.flushall()  # It is ours alone.
            yield RedisStore(client)

    def test_a_store_warns_of_an_eviction_policy(self, store: RedisStore) -> None:
        assert store.warnings() == []
        for client in (node.redis_connection for node in store.client.get_nodes()):
            client.config_set("maxmemory", 2**30)
            client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            (warning,) = store.warnings()
            assert "allkeys-lru" in warning
        finally:
            client.config_set("maxmemory", 0)
            client.config_set("maxmemory-policy", "noeviction")


def test_only_keys_of_its_namespace_count_whatever_the_name(
    redis_client: redis.Redis, redis_namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, neighbour = (RedisStore(redis_client, namespace=f"{redis_namespace}:{name}") for name in ("[a]*", "a"))
    neighbour.put("k", b"one", 60_000)
    assert store.is_empty()
    assert not neighbour.is_empty()
    monkeypatch.setattr("dramatiq_policies.stores.redis._SEARCHED", 0)
    assert not store.is_empty()
