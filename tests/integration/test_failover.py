"""A failover of Redis behind one address: old connections stay open, and lead to a server that takes no writes any more.

So it is behind a virtual address, a proxy, or a name that is resolved anew (ElastiCache, a service of Kubernetes). Two
servers of the test's own, which it may make master and replica.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dramatiq
import pytest
import redis
from dramatiq import Worker
from dramatiq.brokers.redis import RedisBroker

from dramatiq_policies import Idempotency, RetryPolicy, constant, install
from dramatiq_policies.stores.redis import RedisStore
from tests.chaos.servers import RedisServer
from tests.proxy import Proxy

from .places import until


class Pair:
    """A master, its replica, and the address at which whoever is the master is to be reached."""

    def __init__(self, folder: Path) -> None:
        self.servers = [RedisServer(folder / name) for name in ("one", "two")]
        for server in self.servers:
            server.start()
        self.clients = [server.client() for server in self.servers]
        self.clients[1].replicaof("127.0.0.1", self.servers[0].port)
        until(lambda: self.clients[1].info("replication")["master_link_status"] == "up")
        self.proxy = Proxy("127.0.0.1", self.servers[0].port)
        self.url = f"redis://127.0.0.1:{self.proxy.port}/0"

    def fail_over(self) -> None:
        one, two = self.clients
        assert one.execute_command("WAIT", 1, 5_000) == 1
        two.replicaof("NO", "ONE")
        self.proxy.lead_to(self.servers[1].port)
        one.replicaof("127.0.0.1", self.servers[1].port)
        until(lambda: one.info("replication")["role"] == "slave")

    def close(self) -> None:
        self.proxy.close()
        for client, server in zip(self.clients, self.servers, strict=True):
            client.close()
            server.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    one = Pair(tmp_path / "servers")
    yield one
    one.close()


def pool_of(url: str, kind: str) -> Any:
    if kind == "blocking":
        return redis.BlockingConnectionPool.from_url(url, max_connections=8, timeout=5)
    return redis.ConnectionPool.from_url(url)


@pytest.mark.parametrize("kind", ["plain", "blocking"])
@pytest.mark.parametrize("keyed", [False, True])
def test_a_worker_goes_on_with_the_new_master_and_so_do_the_sends_of_its_jobs(
    pair: Pair, kind: str, keyed: bool
) -> None:
    client = redis.Redis(connection_pool=pool_of(pair.url, kind))
    store = RedisStore(redis.Redis(connection_pool=pool_of(pair.url, kind)))
    broker = install(RedisBroker(client=client), idempotency=Idempotency(store))
    done: list[str] = []
    gate = threading.Event()

    @dramatiq.actor(broker=broker, idempotent=keyed, retry_on={OSError: RetryPolicy(attempts=5, wait=constant(10))})
    def follow(name: str) -> None:
        done.append(name)

    @dramatiq.actor(
        broker=broker, idempotent=keyed, retry_on={redis.RedisError: RetryPolicy(attempts=9, wait=constant(10))}
    )
    def job(name: str) -> None:
        gate.wait(30)
        follow.send(f"after {name}")
        done.append(name)

    # Several connections of the pool are open when it happens, also ones that are in use.
    for number in range(4):
        job.send(f"before {number}")
    worker = Worker(broker, worker_timeout=100, worker_threads=4)
    worker.start()
    try:
        until(lambda: worker.work_queue.unfinished_tasks == 4)
        pair.fail_over()
        gate.set()
        expected = {f"{how}before {number}" for number in range(4) for how in ("", "after ")}
        until(lambda: set(done) >= expected, 30, lambda: done)
        # No connection of the pool leads to the one that was demoted.
        for number in range(4):
            job.send(f"later {number}")
        until(lambda: set(done) >= {f"after later {number}" for number in range(4)}, 30, lambda: done)
        until(lambda: pair.clients[1].hlen("dramatiq:default.msgs") == 0)
    finally:
        worker.stop(10_000)
        broker.close()
    for name in ("job", "follow"):
        assert pair.clients[1].zcard(f"dramatiq:{name}.XQ") == 0


def test_a_process_that_only_sends_fails_once_and_sends_to_the_new_master_then(pair: Pair) -> None:
    broker = install(RedisBroker(url=pair.url))

    @dramatiq.actor(broker=broker)
    def job() -> None: ...

    clients = [broker.client.client() for _ in range(5)]
    for one in clients:
        one.ping()
        one.close()
    job.send()
    pair.fail_over()
    with pytest.raises(redis.ResponseError):
        job.send()
    for _ in range(20):
        job.send()
    assert pair.clients[1].llen("dramatiq:default") == 21
    broker.close()


@pytest.mark.parametrize("kind", ["plain", "blocking"])
def test_a_connection_that_is_in_use_meanwhile_is_closed_when_it_is_given_back(pair: Pair, kind: str) -> None:
    client = redis.Redis(connection_pool=pool_of(pair.url, kind))
    RedisStore(client)  # which looks after its client's pool
    with client.pipeline() as busy:
        busy.watch("key")
        client.set("key", 0)
        pair.fail_over()
        with pytest.raises(redis.ReadOnlyError):
            client.set("key", 1)
        assert client.set("key", 2)
    for _ in range(3):
        with client.pipeline() as both:
            both.set("key", 3).set("key", 4).execute()
    client.close()
