"""Servers of our own that are killed and started again on their data."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pika
import pytest
import redis
from dramatiq import Message

from scripts import with_services
from scripts.with_services import LOCALHOST, free_port

#: Seconds that a server may take until it answers.
STARTUP = 60
QUEUES = ("jobs", "jobs.DQ")


class Server:
    """One server process with its data in a folder.

    Attributes:
      url: Where it listens, the same after every start.
    """

    service: with_services.Service
    #: Whom to run as; None for this process's own user.
    user: str | None = None

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.port = free_port()
        self.url = self.service.at(self.port)
        binary = self.service.binary()
        if binary is None:
            pytest.skip(f"{self.service.package} is not installed: servers that may be killed are needed")
        self.binary = binary
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> tuple[list[str], Mapping[str, str]]:
        raise NotImplementedError

    def start(self) -> None:
        self._spawn()
        give_up = time.monotonic() + STARTUP
        while not self.ready():
            if time.monotonic() > give_up:
                said = (self.folder / "output").read_text(errors="replace")[-2_000:]
                raise RuntimeError(f"{self.binary} did not start: {said}")
            if self._ended():
                self._spawn()  # a client's own port may have been this one for a moment
            time.sleep(0.05)

    def _spawn(self) -> None:
        command, environment = self.command()
        with (self.folder / "output").open("ab") as output:
            self.process = subprocess.Popen(
                command,
                env=environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                user=self.user,
            )

    def _ended(self) -> bool:
        assert self.process is not None
        return self.process.poll() is not None

    def ready(self) -> bool:
        return self.service.answers(self.port)

    def signal(self, number: int) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        """Nothing more can be written to its disk. If it ends of that, a supervisor starts it again once there is room."""
        filler = self.folder / "filler"
        with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
            while True:
                stream.write(bytes(4_096))
        yield
        filler.unlink()
        give_up = time.monotonic() + STARTUP
        while not self.ready() and time.monotonic() < give_up:
            if self._ended():
                self.start()
            time.sleep(0.05)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()


class RedisQueues:
    """The data of Dramatiq in a Redis."""

    def client(self) -> redis.Redis:
        raise NotImplementedError

    def waiting(self) -> int:
        """How many messages are in the queues, also those that a worker has taken and not acknowledged."""
        with self.client() as client:
            return sum(client.hlen(f"dramatiq:{queue}.msgs") + client.llen(f"dramatiq:{queue}") for queue in QUEUES)

    def left(self) -> int:
        return self.waiting()

    def letters(self) -> list[Message[Any]]:
        with self.client() as client:
            return [Message.decode(body) for body in client.hvals("dramatiq:jobs.XQ.msgs")]


class RedisServer(RedisQueues, Server):
    """Redis that has written to disk what it has answered."""

    service = with_services.REDIS
    options: tuple[str, ...] = ()

    def command(self) -> tuple[list[str], Mapping[str, str]]:
        durable = ["--save", "", "--appendonly", "yes", "--appendfsync", "always", "--dir", str(self.folder)]
        return [self.binary, "--bind", LOCALHOST, "--port", str(self.port), *durable, *self.options], os.environ

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, socket_timeout=2)

    def ready(self) -> bool:
        if not super().ready():
            return False
        with self.client() as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False  # it is reading its data

    @contextlib.contextmanager
    def failing_snapshots(self) -> Iterator[None]:
        """A snapshot could not be written: by `stop-writes-on-bgsave-error` it takes no writes until one can."""
        in_the_way = self.folder / "dump.rdb"
        in_the_way.mkdir()
        with self.client() as client:
            client.config_set("save", "3600 1")
            self._snapshot(client, "err")
            yield
            in_the_way.rmdir()
            self._snapshot(client, "ok")
            client.config_set("save", "")
        in_the_way.unlink()

    def _snapshot(self, client: redis.Redis, expected: str) -> None:
        client.bgsave()
        while (said := client.info("persistence"))["rdb_bgsave_in_progress"]:
            time.sleep(0.02)
        if said["rdb_last_bgsave_status"] != expected:
            raise RuntimeError(f"a snapshot ended with {said['rdb_last_bgsave_status']}, not {expected}")


class RabbitmqQueues:
    """The data of Dramatiq in a RabbitMQ.

    Attributes:
      url: One, or one for each node, between semicolons.
    """

    url: str

    def _connection(self) -> pika.BlockingConnection:
        return pika.BlockingConnection([pika.URLParameters(url) for url in self.url.split(";")])

    def _drain(self, *queues: str, take: bool) -> list[bytes]:
        found = []
        with self._connection() as connection:
            channel = connection.channel()
            for queue in queues:
                while True:
                    method, _, body = channel.basic_get(queue, auto_ack=take)
                    if method is None:
                        break
                    found.append(body)
        return found

    def waiting(self) -> int:
        """How many messages no worker has taken."""
        with self._connection() as connection:
            channel = connection.channel()
            return sum(channel.queue_declare(queue, passive=True).method.message_count for queue in QUEUES)

    def left(self) -> int:
        """How many messages are in the queues, once no worker runs."""
        return len(self._drain(*QUEUES, take=False))

    def letters(self) -> list[Message[Any]]:
        return [Message.decode(body) for body in self._drain("jobs.XQ", take=False)]


class RabbitmqServer(RabbitmqQueues, Server):
    """A RabbitMQ node of its own."""

    service = with_services.RABBITMQ

    def __init__(self, folder: Path, epmd_port: int | None = None) -> None:
        super().__init__(folder)
        self.epmd_port = free_port() if epmd_port is None else epmd_port
        self.environment = with_services.rabbitmq_environment(folder, self.port, self.epmd_port)

    def command(self) -> tuple[list[str], Mapping[str, str]]:
        return [self.binary], self.environment

    def close(self) -> None:
        super().close()
        with_services.stop_epmd(self.epmd_port)

    def control(self, *arguments: str) -> str:
        """Return the output of ``rabbitmqctl``."""
        tool = Path(self.binary).resolve().with_name("rabbitmqctl")
        done = subprocess.run(
            [str(tool), "--quiet", *arguments], env=self.environment, check=True, capture_output=True, text=True
        )
        return done.stdout

    @contextlib.contextmanager
    def disk_alarm(self) -> Iterator[None]:
        """It takes no messages, as when less than its limit is free."""
        self.control("set_disk_free_limit", "100000GB")
        yield
        self.control("set_disk_free_limit", "1MB")


class DatabaseServer(Server):
    """A database server of its own, in a folder that its user may enter."""

    #: The user of its package.
    owner: str

    def __init__(self) -> None:
        home = Path(tempfile.mkdtemp(prefix=f"dp-chaos-{self.service.name}-"))
        super().__init__(home / "server")
        self.data = home / "data"
        self.user = with_services.user_of_databases(self.owner, home)
        with_services.prepare(self.initialise(), home, self.user)

    def initialise(self) -> list[str]:
        """The command that makes the data."""
        raise NotImplementedError

    def close(self) -> None:
        super().close()
        shutil.rmtree(self.folder.parent, ignore_errors=True)


def _children_of(pid: int) -> list[int]:
    children = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == pid:
                children.append(int(folder.name))
    return children


class PostgresqlServer(DatabaseServer):
    service = with_services.POSTGRESQL
    owner = "postgres"

    def initialise(self) -> list[str]:
        initdb = Path(os.path.realpath(self.binary)).with_name("initdb")
        return [str(initdb), *with_services.INITDB, str(self.data)]

    def command(self) -> tuple[list[str], Mapping[str, str]]:
        return [self.binary, *with_services.postgresql_options(self.data, self.port)], os.environ

    def kill(self) -> None:
        """Kill the processes of the connections too. Each leads another group, and would go on for a moment after the server's end."""
        assert self.process is not None
        others = _children_of(self.process.pid)
        super().kill()
        for pid in others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            with_services.end_postgresql(self.process)
        super().close()


class MariadbServer(DatabaseServer):
    service = with_services.MARIADB
    owner = "mysql"

    def initialise(self) -> list[str]:
        return ["mariadb-install-db", *with_services.MARIADB_INSTALL, f"--datadir={self.data}"]

    def command(self) -> tuple[list[str], Mapping[str, str]]:
        environment = {**os.environ, "TMPDIR": str(self.folder.parent)}
        return [self.binary, *with_services.mariadb_options(self.data, self.port)], environment
