"""A failover of Redis through Sentinel: servers and a sentinel of the test's own, and the real command.

Redis replicates after it has answered: what a master took and had not yet passed on when it died is lost, whatever a
client does. So the sends are waited for with WAIT here, as the docs say; what the worker does is not, and must not
matter, since each of its publish is one step, which the replica has wholly or not at all.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import redis
from dramatiq.brokers.redis import RedisBroker
from redis.sentinel import MasterNotFoundError, Sentinel

from .places import RedisPlace, until
from .test_processes import Application

APP = """
import os, pathlib, time
import dramatiq
from dramatiq.brokers.redis import RedisBroker
from redis.sentinel import Sentinel
from dramatiq_policies import RetryPolicy, constant, current_job, install

sentinel = Sentinel([("{host}", {port})], socket_timeout=2)
broker = install(RedisBroker(client=sentinel.master_for("shop", socket_timeout=2)))
dramatiq.set_broker(broker)
journal = pathlib.Path(os.environ["APP_JOURNAL"])

# One in three is tried twice, and waits in the delay queue meanwhile.
@dramatiq.actor(queue_name="{queue}", retry_on={{TimeoutError: RetryPolicy(attempts=3, wait=constant(300))}})
def job(number):
    time.sleep(0.02)
    if number in range(0, 1_000, 3) and current_job().attempt == 1:
        raise TimeoutError(number)
    with journal.open("a") as stream:
        stream.write(f"{{number}}\\n")
"""

LOCALHOST = "127.0.0.1"
JOBS = 300


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOCALHOST, 0))
        return probe.getsockname()[1]


class Servers:
    """A master, its replica, and one sentinel that watches them."""

    def __init__(self, folder: Path) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            pytest.skip("redis-server is not installed: a failover needs servers that may be killed")
        self.binary = binary
        self.folder = folder
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.master, self.replica, self.sentinel = free_port(), free_port(), free_port()
        self.start(self.master)
        self.start(self.replica, "--replicaof", LOCALHOST, str(self.master))
        until(lambda: self.client(self.replica).info("replication")["master_link_status"] == "up")
        (folder / "sentinel.conf").write_text(
            f"port {self.sentinel}\nbind {LOCALHOST}\ndir {folder}\n"
            f"sentinel monitor shop {LOCALHOST} {self.master} 1\n"
            "sentinel down-after-milliseconds shop 500\nsentinel failover-timeout shop 3000\n"
        )
        self._run(self.sentinel, str(folder / "sentinel.conf"), "--sentinel")
        until(lambda: self.client(self.sentinel).execute_command("SENTINEL", "SLAVES", "shop"))

    def start(self, port: int, *options: str) -> None:
        folder = self.folder / str(port)
        folder.mkdir()
        quick = ["--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0", "--save", ""]
        self._run(port, "--port", str(port), "--bind", LOCALHOST, "--dir", str(folder), *quick, *options)

    def _run(self, port: int, *arguments: str) -> None:
        with (self.folder / f"{port}.log").open("wb") as log:
            self.running[port] = subprocess.Popen([self.binary, *arguments], stdout=log, stderr=log)
        until(lambda: self._answers(port))

    def _answers(self, port: int) -> bool:
        try:
            return bool(self.client(port).ping())
        except redis.ConnectionError:
            return False

    def client(self, port: int) -> redis.Redis:
        return redis.Redis(host=LOCALHOST, port=port, socket_timeout=2)

    def sentinels(self) -> Sentinel:
        return Sentinel([(LOCALHOST, self.sentinel)], socket_timeout=2)

    def current_master(self) -> int:
        try:
            return int(self.sentinels().discover_master("shop")[1])
        except MasterNotFoundError:  # for a moment
            return 0

    def kill_the_master(self) -> None:
        self.running[self.master].kill()
        self.running[self.master].wait()

    def ask_for_a_failover(self) -> None:
        self.client(self.sentinel).execute_command("SENTINEL", "FAILOVER", "shop")

    def close(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()


class SentinelPlace(RedisPlace):
    """The queue on whichever server is the master."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        client = servers.sentinels().master_for("shop", socket_timeout=2)
        super().__init__("sentinel", "work", "dramatiq", client)

    def _make(self, url: str) -> RedisBroker:
        return RedisBroker(client=self.servers.sentinels().master_for("shop", socket_timeout=2))


@pytest.fixture
def servers(tmp_path: Path):
    folder = tmp_path / "servers"
    folder.mkdir()
    one = Servers(folder)
    yield one
    one.close()


@pytest.fixture
def application(servers: Servers, tmp_path: Path):
    place = SentinelPlace(servers)
    one = Application(place, tmp_path)
    one.module.write_text(APP.format(host=LOCALHOST, port=servers.sentinel, queue=place.queue))
    yield one
    one.close()
    place.close()


@pytest.mark.parametrize("failover", ["kill_the_master", "ask_for_a_failover"])
def test_no_job_is_lost_when_redis_fails_over(servers: Servers, application: Application, failover: str) -> None:
    place = application.place
    numbers = [str(n) for n in range(JOBS)]
    for n in range(JOBS):
        application.send("job", n)
    assert servers.client(servers.master).execute_command("WAIT", 1, 5_000) == 1

    process = application.start("--threads", "4")
    until(lambda: len(application.lines()) > JOBS // 4, 20)
    getattr(servers, failover)()
    assert len(application.lines()) < JOBS  # in the middle of the work
    until(lambda: servers.current_master() == servers.replica, 20)
    until(
        lambda: application.lines().keys() >= set(numbers), 60, lambda: sorted(set(numbers) - set(application.lines()))
    )
    application.send("job", "sent after the failover")
    application.wait_for("sent after the failover")
    # Copies of jobs that were done before the new master knew of it, also those that wait for their time.
    until(lambda: not any(place.client.hlen(place.key(f"work{part}.msgs")) for part in ("", ".DQ")), 20)
    application.stop(process)

    assert place.left() == []
    assert place.dead() == []
