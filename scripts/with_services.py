"""Run a command with a real Redis, RabbitMQ, PostgreSQL and MariaDB.

python3 scripts/with_services.py [--private] COMMAND...

The script looks for each server in this order:
1. the URL in REDIS_URL, RABBITMQ_URL, POSTGRESQL_URL or MARIADB_URL;
2. the standard local port (RabbitMQ as guest; the databases as postgres and root, without a password);
3. a private server on a free port, from an installed binary;
4. as 3, after an installation with apt, if you are root;
5. a server started by `docker compose` on a free port.
The command gets the four URLs, and the script exits with the command's code. The script stops all servers that the script has
started, unless SIGKILL ends the script. Several runs at the same time do not disturb each other. `--private` skips 1 and 2 and
sets DP_PRIVATE_SERVICES=1, for commands that empty their servers.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import pwd
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LOCALHOST = "127.0.0.1"
STARTUP = 90  # seconds until a server must answer
PATIENCE = 10  # seconds until a process must have ended
POLICY = Path("/usr/sbin/policy-rc.d")  # Debian packages ask this script before they start a service
APT_LOCK = Path(tempfile.gettempdir()) / "dramatiq-policies-apt.lock"


class Unavailable(Exception):
    """No server can be found or started on this machine. The text gives the reason in one sentence."""


class Interrupted(Exception):
    """SIGINT, SIGTERM or SIGHUP came."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


signals: list[int] = []  # Received signals: handled only when every started process is known.


def raise_if_interrupted() -> None:
    if signals:
        raise Interrupted(signals[0])


# ---------------------------------------------------------------------- does a server answer?


def redis_answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((LOCALHOST, port), timeout=2) as connection:
        connection.sendall(b"PING\r\n")
        return connection.recv(64).startswith(b"+PONG")
    return False


def rabbitmq_answers(port: int) -> bool:
    """Return whether guest may log in: AMQP 0-9-1 up to the server's connection.tune."""
    with contextlib.suppress(OSError), socket.create_connection((LOCALHOST, port), timeout=5) as connection:
        connection.sendall(b"AMQP\x00\x00\x09\x01")
        if _amqp_method(connection) != (10, 10):  # connection.start
            return False
        login = b"\x00guest\x00guest"
        start_ok = struct.pack(">HHI", 10, 11, 0) + b"\x05PLAIN" + struct.pack(">I", len(login)) + login + b"\x05en_US"
        connection.sendall(struct.pack(">BHI", 1, 0, len(start_ok)) + start_ok + b"\xce")
        return _amqp_method(connection) == (10, 30)  # connection.tune
    return False


def _amqp_method(connection: socket.socket) -> tuple[int, int] | None:
    header = _read(connection, 7)
    if header[:3] != b"\x01\x00\x00":  # a method, on channel 0
        return None
    payload = _read(connection, struct.unpack(">I", header[3:])[0] + 1)
    return struct.unpack_from(">HH", payload)


def postgresql_answers(port: int) -> bool:
    """Whether postgres may log in without a password."""
    with contextlib.suppress(OSError), socket.create_connection((LOCALHOST, port), timeout=5) as connection:
        login = struct.pack(">I", 3 << 16) + b"user\x00postgres\x00database\x00postgres\x00\x00"
        connection.sendall(struct.pack(">I", len(login) + 4) + login)
        return _read(connection, 9) == b"R" + struct.pack(">II", 8, 0)  # AuthenticationOk
    return False


def mariadb_answers(port: int) -> bool:
    """Whether root may log in without a password."""
    with contextlib.suppress(OSError), socket.create_connection((LOCALHOST, port), timeout=5) as connection:
        if _mysql_packet(connection)[1][:1] != b"\x0a":  # the server's handshake, version 10
            return False
        # The protocol of 4.1, with the authentication of today.
        login = struct.pack("<IIB23x", 0x8200, 1 << 24, 45) + b"root\x00\x00"
        connection.sendall(struct.pack("<I", len(login) | 1 << 24) + login)
        number, answer = _mysql_packet(connection)
        if answer[:1] == b"\xfe":  # A switch to another authentication, also without a password.
            connection.sendall(struct.pack("<I", (number + 1) << 24))
            answer = _mysql_packet(connection)[1]
        return answer[:1] == b"\x00"
    return False


def _mysql_packet(connection: socket.socket) -> tuple[int, bytes]:
    (header,) = struct.unpack("<I", _read(connection, 4))
    return header >> 24, _read(connection, header & 0xFFFFFF)


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = connection.recv(size - len(data))
        if not chunk:
            raise ConnectionError("closed")
        data += chunk
    return data


# ---------------------------------------------------------------------- private servers


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOCALHOST, 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def private_redis(binary: str) -> Iterator[int]:
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="dp-redis-") as folder:
        options = ["--bind", LOCALHOST, "--port", str(port), "--save", "", "--appendonly", "no", "--dir", folder]
        with _server([binary, *options], os.environ, Path(folder), lambda: redis_answers(port)):
            yield port


@contextlib.contextmanager
def private_rabbitmq(binary: str) -> Iterator[int]:
    port, epmd_port = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="dp-rabbitmq-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        environment = rabbitmq_environment(folder, port, epmd_port)
        try:
            with _server([binary], environment, folder, lambda: rabbitmq_answers(port)):
                yield port
        finally:
            stop_epmd(epmd_port)


def rabbitmq_environment(folder: Path, port: int, epmd_port: int) -> dict[str, str]:
    """Return the environment of a private node. The folder holds its data, logs, cookie and settings."""
    (folder / "rabbitmq.conf").write_text(
        f"listeners.tcp.default = {LOCALHOST}:{port}\ndisk_free_limit.absolute = 1MB\n"
    )
    (folder / "enabled_plugins").write_text("[].\n")
    (folder / "env.conf").touch()
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RABBITMQ_", "ERL_"))},
        "HOME": str(folder),  # the Erlang cookie
        "ERL_EPMD_PORT": str(epmd_port),  # a private name server, which the script can stop
        "ERL_EPMD_ADDRESS": LOCALHOST,
        "ERL_EPMD_RELAXED_COMMAND_CHECK": "1",
        "RABBITMQ_NODENAME": f"dp-{uuid.uuid4().hex[:12]}@{LOCALHOST}",
        "RABBITMQ_USE_LONGNAME": "true",  # an address is one
        "RABBITMQ_DIST_PORT": str(free_port()),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        "RABBITMQ_CONFIG_FILE": f"{folder / 'rabbitmq.conf'}",
        "RABBITMQ_CONF_ENV_FILE": f"{folder / 'env.conf'}",
        "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder / 'enabled_plugins'}",
        "RABBITMQ_MNESIA_BASE": f"{folder / 'data'}",
        "RABBITMQ_LOG_BASE": f"{folder / 'log'}",
        "RABBITMQ_PID_FILE": f"{folder / 'pid'}",
    }


def stop_epmd(port: int) -> None:
    """Stop the Erlang name server started by a node."""
    with contextlib.suppress(OSError), socket.create_connection((LOCALHOST, port), timeout=2) as epmd:
        epmd.sendall(b"\x00\x01k")  # kill
        epmd.recv(2)


@contextlib.contextmanager
def private_postgresql(binary: str) -> Iterator[int]:
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="dp-postgresql-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        user = user_of_databases("postgres", folder)
        prepare([str(Path(os.path.realpath(binary)).with_name("initdb")), *INITDB, str(folder / "data")], folder, user)
        command = [binary, *postgresql_options(folder / "data", port)]
        with _server(command, os.environ, folder, lambda: postgresql_answers(port), user, end_postgresql):
            yield port


INITDB = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", "--pgdata"]


def end_postgresql(server: subprocess.Popen[bytes]) -> None:
    """Shut down at once. SIGKILL would leave shared memory in the machine, with each run."""
    server.send_signal(signal.SIGQUIT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(PATIENCE)


def postgresql_options(data: Path, port: int) -> list[str]:
    # Without fsync a killed server loses nothing; a crashed machine would.
    settings = {"listen_addresses": LOCALHOST, "port": port, "unix_socket_directories": "", "fsync": "off"}
    return ["-D", str(data), *(part for name, value in settings.items() for part in ("-c", f"{name}={value}"))]


@contextlib.contextmanager
def private_mariadb(binary: str) -> Iterator[int]:
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="dp-mariadb-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        user = user_of_databases("mysql", folder)
        initialise = shutil.which("mariadb-install-db") or shutil.which("mysql_install_db")
        if initialise is None:
            raise Unavailable("mariadb-install-db is not installed.")
        prepare([initialise, *MARIADB_INSTALL, f"--datadir={folder / 'data'}"], folder, user)
        command = [binary, *mariadb_options(folder / "data", port)]
        environment = {**os.environ, "TMPDIR": str(folder)}
        with _server(command, environment, folder, lambda: mariadb_answers(port), user):
            yield port


MARIADB_INSTALL = ["--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db"]


def mariadb_options(data: Path, port: int) -> list[str]:
    options = {"datadir": data, "port": port, "bind-address": LOCALHOST, "socket": "socket", "pid-file": "pid"}
    small = ["--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=2", "--skip-name-resolve"]
    return ["--no-defaults", *(f"--{name}={value}" for name, value in options.items()), *small]


def user_of_databases(name: str, folder: Path) -> str | None:
    """Return the user for a database, which refuses root: the user of its Debian package, or nobody. The user gets the folder."""
    if os.geteuid() != 0:
        return None
    user = name
    try:
        pwd.getpwnam(name)
    except KeyError:
        user = "nobody"
    shutil.chown(folder, user)
    return user


def prepare(command: list[str], folder: Path, user: str | None) -> None:
    done = subprocess.run(
        command,
        env={**os.environ, "TMPDIR": str(folder)},  # a folder where this user may write
        user=user,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Unavailable(f"{command[0]} failed: {' '.join(done.stdout.split())[-500:]}")


@contextlib.contextmanager
def _server(
    command: list[str],
    environment: Mapping[str, str],
    folder: Path,
    answers: Callable[[], bool],
    user: str | None = None,
    end: Callable[[subprocess.Popen[bytes]], object] | None = None,
) -> Iterator[None]:
    output = folder / "output"
    with output.open("wb") as log:
        # In a separate session: Ctrl-C in the terminal reaches only the command, and one signal stops all processes of the server.
        server = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            user=user,
        )
    try:
        give_up = time.monotonic() + STARTUP
        while not answers():
            raise_if_interrupted()
            if server.poll() is not None or time.monotonic() > give_up:
                said = " ".join(output.read_text(errors="replace").split())[-500:]
                raise Unavailable(f"{command[0]} did not start: {said}")
            time.sleep(0.1)
        yield
    finally:
        if end is not None:
            end(server)
        # The data is deleted, too: the server may be killed.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


# ---------------------------------------------------------------------- the services


class Service(NamedTuple):
    name: str
    variable: str  # the environment variable with its URL
    url: str  # {port} stands for its port
    port: int  # the standard one
    answers: Callable[[int], bool]
    binaries: tuple[str, ...]  # the first installed binary, in its newest version
    package: str  # in Debian
    private: Callable[[str], contextlib.AbstractContextManager[int]]
    container_port: str  # the variable of docker-compose.yml for the port

    def binary(self) -> str | None:
        candidates = (found for name in self.binaries for found in (_versions(name) if "*" in name else [name]))
        return next(filter(None, map(shutil.which, candidates)), None)

    def at(self, port: int) -> str:
        return self.url.format(port=port)


def _versions(pattern: str) -> list[str]:
    """The files of a pattern, by the numbers in their paths, the largest first."""
    found = Path("/").glob(pattern.removeprefix("/"))
    return sorted(map(str, found), key=lambda path: [int(number) for number in re.findall(r"\d+", path)], reverse=True)


REDIS = Service(
    name="redis",
    variable="REDIS_URL",
    url="redis://127.0.0.1:{port}/0",
    port=6379,
    answers=redis_answers,
    binaries=("redis-server", "valkey-server"),
    package="redis-server",
    private=private_redis,
    container_port="REDIS_PORT",
)
RABBITMQ = Service(
    name="rabbitmq",
    variable="RABBITMQ_URL",
    url="amqp://guest:guest@127.0.0.1:{port}",
    port=5672,
    answers=rabbitmq_answers,
    # On the PATH of Debian and Red Hat is a wrapper, which requires a certain user and folder.
    binaries=("/usr/lib/rabbitmq/bin/rabbitmq-server", "rabbitmq-server", "/usr/sbin/rabbitmq-server"),
    package="rabbitmq-server",
    private=private_rabbitmq,
    container_port="RABBITMQ_PORT",
)
POSTGRESQL = Service(
    name="postgresql",
    variable="POSTGRESQL_URL",
    url="postgresql://postgres@127.0.0.1:{port}/postgres",
    port=5432,
    answers=postgresql_answers,
    # Not on the PATH of Debian and Red Hat.
    binaries=("postgres", "/usr/lib/postgresql/*/bin/postgres", "/usr/pgsql-*/bin/postgres"),
    package="postgresql",
    private=private_postgresql,
    container_port="POSTGRESQL_PORT",
)
MARIADB = Service(
    name="mariadb",
    variable="MARIADB_URL",
    url="mariadb://root@127.0.0.1:{port}/mysql",
    port=3306,
    answers=mariadb_answers,
    binaries=("mariadbd", "/usr/sbin/mariadbd"),
    package="mariadb-server",
    private=private_mariadb,
    container_port="MARIADB_PORT",
)
SERVICES = (REDIS, RABBITMQ, POSTGRESQL, MARIADB)


@contextlib.contextmanager
def service(wanted: Service, *, private: bool = False) -> Iterator[str]:
    """Yield the URL of a server; stop the server afterwards if the script has started it."""
    with contextlib.ExitStack() as stack:
        raise_if_interrupted()
        if not private and os.environ.get(wanted.variable):
            url, source = os.environ[wanted.variable], f"from {wanted.variable}"
        elif not private and wanted.answers(wanted.port):
            url, source = wanted.at(wanted.port), "already running"
        elif wanted.binary() or install(wanted):
            url, source = wanted.at(stack.enter_context(started(wanted))), "started for this run"
        elif docker_answers():
            url, source = wanted.at(stack.enter_context(container(wanted))), "started in Docker for this run"
        else:
            raise Unavailable(
                f"There is no {wanted.name} to test with: install {wanted.package}, or Docker with Compose, "
                f"or set {wanted.variable} to a running one."
            )
        say(f"{wanted.name}: {url.rpartition('@')[2].rpartition('//')[2]} ({source})")
        yield url


@contextlib.contextmanager
def started(wanted: Service) -> Iterator[int]:
    """Start a private server. Try other ports if another process has taken the free ports first."""
    binary = wanted.binary()
    if binary is None:
        raise Unavailable(f"{wanted.package} was installed, but none of {', '.join(wanted.binaries)} is there.")
    with contextlib.ExitStack() as stack:
        for attempts_left in (2, 1, 0):
            try:
                port = stack.enter_context(wanted.private(binary))
                break
            except Unavailable:
                if not attempts_left:
                    raise
        yield port


def install(wanted: Service) -> bool:
    """Install the server's Debian package without starting its service. Return False where there is no apt."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return False
    with APT_LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if wanted.binary():
            return True  # another run was faster
        say(f"{wanted.name}: installing {wanted.package} with apt-get")
        apt = ["apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=600"]
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        with services_not_started():
            for arguments in (["update"], ["install", "--no-install-recommends", wanted.package]):
                done = subprocess.run(
                    [*apt, *arguments],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    check=False,
                )
                if done.returncode and arguments != ["update"]:  # one of its sources may be down
                    say(done.stdout[-2_000:])
                    return False
        return True


@contextlib.contextmanager
def services_not_started() -> Iterator[None]:
    """Keep Debian packages from starting their services meanwhile."""
    if POLICY.exists():
        yield  # the machine has its own say
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink(missing_ok=True)


def docker_answers() -> bool:
    if not shutil.which("docker"):
        return False
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return all(
            subprocess.run(["docker", *arguments], capture_output=True, timeout=30, check=False).returncode == 0
            for arguments in (["info"], ["compose", "version"])
        )
    return False


@contextlib.contextmanager
def container(wanted: Service) -> Iterator[int]:
    """Start the service of docker-compose.yml in a separate Compose project; remove the project and its volumes afterwards."""
    port = free_port()
    environment = {
        **os.environ,
        wanted.container_port: str(port),
        "RABBITMQ_MANAGEMENT_PORT": str(free_port()),
        # `up` starts a named service without its profile, but `down` leaves it running.
        "COMPOSE_PROFILES": "databases",
    }
    project = f"dp-{wanted.name}-{uuid.uuid4().hex[:12]}"
    compose = ["docker", "compose", "--project-name", project, "--file", str(ROOT / "docker-compose.yml")]
    try:
        up = subprocess.run([*compose, "up", "--detach", "--wait", wanted.name], env=environment, check=False)
        if up.returncode:
            raise Unavailable(f"docker compose could not start {wanted.name}; what it said is above.")
        yield port
    finally:
        subprocess.run([*compose, "down", "--volumes"], env=environment, check=False)


# ---------------------------------------------------------------------- the command


def run(command: list[str], environment: Mapping[str, str]) -> int:
    """Run the command and return its exit code, as a shell would. An interrupt interrupts the command, too."""
    try:
        child = subprocess.Popen(command, env=environment)
    except OSError as error:
        raise Unavailable(f"{command[0]} can't be run: {error.strerror}.") from None
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(0.1)
                return code if code >= 0 else 128 - code
            raise_if_interrupted()
    except Interrupted as interrupted:
        if interrupted.signum != signal.SIGINT:  # The terminal has sent SIGINT to the command as well.
            child.terminate()
        raise
    finally:
        _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    for stop in (None, child.terminate, child.kill):
        if stop is not None:
            stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(PATIENCE)
            return


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--private", action="store_true", help="start servers of its own, whatever is running")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    if not options.command:
        parser.error("which command?")
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda signum, _frame: signals.append(signum))
    try:
        with contextlib.ExitStack() as stack:
            environment = {**os.environ}
            for wanted in SERVICES:
                environment[wanted.variable] = stack.enter_context(service(wanted, private=options.private))
            if options.private:
                environment["DP_PRIVATE_SERVICES"] = "1"
            return run(options.command, environment)
    except Unavailable as error:
        say(f"with_services: {error}")
        return 69  # EX_UNAVAILABLE
    except Interrupted as interrupted:
        return 128 + interrupted.signum


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
