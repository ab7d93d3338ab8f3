"""Servers that are several: three RabbitMQ nodes with quorum queues, three Redis servers behind a sentinel."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError
from redis.sentinel import MasterNotFoundError, Sentinel

from scripts import with_services
from scripts.with_services import LOCALHOST, free_port

from .clients import SOCKET_TIMEOUT, redis_client
from .servers import STARTUP, RabbitmqQueues, RabbitmqServer, RedisQueues, RedisServer, Server

VHOST = "chaos"
NODES = 3


class RabbitmqNode(RabbitmqServer):
    """One node of a cluster, which waits for the others on its first start."""

    def __init__(self, folder: Path, epmd_port: int) -> None:
        super().__init__(folder, epmd_port)
        (folder / ".erlang.cookie").write_text("chaos")
        (folder / ".erlang.cookie").chmod(0o400)
        self.name = self.environment["RABBITMQ_NODENAME"]

    def join(self, nodes: list[str]) -> None:
        self.others = [node for node in nodes if node != self.name]
        lines = [f"cluster_formation.classic_config.nodes.{number} = {node}" for number, node in enumerate(nodes, 1)]
        with (self.folder / "rabbitmq.conf").open("a") as settings:
            settings.write("cluster_formation.peer_discovery_backend = classic_config\n")
            settings.write("cluster_partition_handling = pause_minority\n")
            settings.write("\n".join(lines) + "\n")

    def cut_off(self) -> None:
        """It and the others refuse each other, as strangers with another cookie."""
        self._each_other("erlang:set_cookie(N, stranger), erlang:disconnect_node(N)")

    def let_in(self) -> None:
        self._each_other("erlang:set_cookie(N, erlang:get_cookie())")

    def _each_other(self, what: str) -> None:
        others = ",".join(f"'{node}'" for node in self.others)
        self.control("eval", f"[begin {what} end || N <- [{others}]].")


class RabbitmqCluster(RabbitmqQueues):
    """Three nodes; a virtual host of theirs makes every queue a quorum queue."""

    def __init__(self, folder: Path) -> None:
        self.epmd_port = free_port()
        self.nodes = [RabbitmqNode(folder / f"node-{number}", self.epmd_port) for number in range(NODES)]
        for node in self.nodes:
            node.join([one.name for one in self.nodes])
        self.url = ";".join(f"{node.url}/{VHOST}" for node in self.nodes)

    def start(self) -> None:
        for node in self.nodes:
            node.start()
        first = self.nodes[0]
        first.control("await_online_nodes", str(NODES))
        first.control("add_vhost", VHOST, "--default-queue-type", "quorum")
        first.control("set_permissions", "-p", VHOST, "guest", ".*", ".*", ".*")

    def kill_one(self, seconds: float, choose: random.Random) -> None:
        """Kill a node and start it again on its data that many seconds later."""
        node = choose.choice(self.nodes)
        node.kill()
        time.sleep(seconds)
        node.start()

    def cut_one_off(self, seconds: float, choose: random.Random) -> None:
        """For that many seconds a node and the others do not see each other."""
        node = choose.choice(self.nodes)
        node.cut_off()
        time.sleep(seconds)
        node.let_in()
        node.control("await_startup")  # it had paused, as the minority
        node.control("await_online_nodes", str(NODES))

    def left(self) -> int:
        kinds = set(self.nodes[0].control("list_queues", "-p", VHOST, "type", "--no-table-headers").split())
        if kinds != {"quorum"}:
            raise RuntimeError(f"queues that are not quorum queues: {kinds}")
        return super().left()

    def close(self) -> None:
        for node in self.nodes:
            Server.close(node)
        with_services.stop_epmd(self.epmd_port)


class SentinelServer(RedisServer):
    """The process that watches the others and decides which is the master."""

    def command(self) -> tuple[list[str], Mapping[str, str]]:
        return [self.binary, str(self.folder / "sentinel.conf"), "--sentinel"], os.environ


class RedisBehindSentinel(RedisQueues):
    """A master, two replicas and one sentinel.

    Parameters:
      min_replicas: Without how many replicas a master takes no writes.
    """

    def __init__(self, folder: Path, min_replicas: int = 0) -> None:
        self.options = (
            *("--repl-diskless-sync-delay", "0"),
            *("--min-replicas-to-write", str(min_replicas), "--min-replicas-max-lag", "2"),
        )
        self.nodes = [RedisServer(folder / f"redis-{number}") for number in range(NODES)]
        self.sentinel = SentinelServer(folder / "sentinel")
        self.url = f"sentinel://{LOCALHOST}:{self.sentinel.port}/chaos"

    def start(self) -> None:
        master = self.nodes[0]
        master.options = self.options
        master.start()
        for replica in self.nodes[1:]:
            self._follow(replica, master.port)
        (self.sentinel.folder / "sentinel.conf").write_text(
            f"port {self.sentinel.port}\nbind {LOCALHOST}\ndir {self.sentinel.folder}\n"
            f"sentinel monitor chaos {LOCALHOST} {master.port} 1\n"
            # Less, and on a busy machine the sentinel replaces a master that is alive: then two take messages.
            "sentinel down-after-milliseconds chaos 2000\nsentinel failover-timeout chaos 3000\n"
        )
        self.sentinel.start()
        self._until(lambda: len(self._ask().discover_slaves("chaos")) == NODES - 1)

    def _follow(self, node: RedisServer, master: int) -> None:
        node.options = (*self.options, "--replicaof", LOCALHOST, str(master))
        node.start()
        self._until(lambda: self._info(node)["master_link_status"] == "up")

    def _info(self, node: RedisServer) -> Any:
        with node.client() as client:
            return client.info("replication")

    def _until(self, condition: Any) -> None:
        give_up = time.monotonic() + STARTUP
        while True:
            with contextlib.suppress(RedisError, KeyError):
                if condition():
                    return
            if time.monotonic() > give_up:
                raise RuntimeError("the Redis servers did not get there")
            time.sleep(0.05)

    def _ask(self) -> Sentinel:
        return Sentinel([(LOCALHOST, self.sentinel.port)], socket_timeout=2)

    def _master(self) -> int:
        try:
            return int(self._ask().discover_master("chaos")[1])
        except MasterNotFoundError:  # for a moment
            return 0

    def client(self) -> Any:
        return redis_client(self.url)

    def fail_over(self, lag: float) -> float:
        """For that many seconds the master reaches no replica, then it dies, and another takes its place.

        Returns:
          When it died, by ``time.monotonic()``.
        """
        old = self._current()
        self._let_in(old, "wrong")
        with old.client() as client:
            client.execute_command("CLIENT", "KILL", "TYPE", "replica")
        time.sleep(lag)
        old.kill()
        died = time.monotonic()
        self._let_in(old, "")
        self._until(lambda: self._master() not in (0, old.port))
        self._follow(old, self._master())
        self._until(lambda: self._info_of_master()["connected_slaves"] == NODES - 1)
        return died

    def hang(self) -> None:
        """The master stands still until clients know another, and then goes on until the sentinel demotes it."""
        old = self._current()
        old.signal(signal.SIGSTOP)
        self._until(lambda: self._master() not in (0, old.port))
        # Commands sent to the old master have no reply by now: a client would believe a reply.
        time.sleep(SOCKET_TIMEOUT + 0.5)
        old.signal(signal.SIGCONT)
        self._until(lambda: self._info_of_master()["connected_slaves"] == NODES - 1)

    def _current(self) -> RedisServer:
        return next(node for node in self.nodes if node.port == self._master())

    def _let_in(self, master: RedisServer, password: str) -> None:
        """The replicas' first command to their master, which has no password."""
        for node in self.nodes:
            if node is not master:
                with node.client() as client:
                    client.config_set("masterauth", password)

    def _info_of_master(self) -> Any:
        with self.client() as client:
            return client.info("replication")

    def close(self) -> None:
        for node in (*self.nodes, self.sentinel):
            node.close()
