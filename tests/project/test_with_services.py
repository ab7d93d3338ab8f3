"""scripts/with_services.py without servers; tests/integration/test_with_services.py starts real ones."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "with_services.py"

START = bytes.fromhex("01 0000 00000004 000a000a ce")
TUNE = bytes.fromhex("01 0000 00000004 000a001e ce")
HANDSHAKE = bytes.fromhex("05 00 00 00 0a 31 31 2e 34")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("with_services", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Put a shell script on an otherwise empty PATH. The returned file has the arguments of its calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def add(name: str, body: str) -> Path:
        calls = tmp_path / f"{name}.calls"
        (folder / name).write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{body}\n')
        (folder / name).chmod(0o755)
        return calls

    return add


@contextmanager
def server_that_answers(*replies: bytes, greeting: bytes = b"") -> Iterator[int]:
    """Takes one connection. Sends the greeting, then each reply after it has received something, and closes the connection."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(greeting)
            for reply in replies:
                connection.recv(1_024)
                connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


class Fake:
    """A service without any server, until a test provides a server."""

    def __init__(self, script: ModuleType) -> None:
        self.events: list[str] = []
        self.service = script.Service(
            name="fake",
            variable="FAKE_URL",
            url="fake://127.0.0.1:{port}",
            port=1,
            answers=lambda _port: False,
            binaries=("fake-server",),
            package="fake-server",
            private=self.private,
            container_port="FAKE_PORT",
        )

    @contextmanager
    def private(self, _binary: str) -> Iterator[int]:
        self.events.append("started")
        try:
            yield 2
        finally:
            self.events.append("stopped")


@pytest.fixture
def fake(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.delenv("FAKE_URL", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1_000)
    return Fake(script)


def test_redis_answers_when_it_says_pong(script: ModuleType) -> None:
    with server_that_answers(b"+PONG\r\n") as port:
        assert script.redis_answers(port)


def test_a_redis_that_wants_a_password_does_not_count(script: ModuleType) -> None:
    with server_that_answers(b"-NOAUTH Authentication required.\r\n") as port:
        assert not script.redis_answers(port)


def test_rabbitmq_answers_when_guest_may_log_in(script: ModuleType) -> None:
    with server_that_answers(START, TUNE) as port:
        assert script.rabbitmq_answers(port)


def test_a_rabbitmq_that_refuses_guest_does_not_count(script: ModuleType) -> None:
    with server_that_answers(START, b"") as port:
        assert not script.rabbitmq_answers(port)


def test_postgresql_answers_when_postgres_may_log_in(script: ModuleType) -> None:
    with server_that_answers(bytes.fromhex("52 00000008 00000000")) as port:
        assert script.postgresql_answers(port)


def test_a_postgresql_that_wants_a_password_does_not_count(script: ModuleType) -> None:
    with server_that_answers(bytes.fromhex("52 0000000c 00000005 01020304")) as port:
        assert not script.postgresql_answers(port)


@pytest.mark.parametrize("asks_again", [False, True])
def test_mariadb_answers_when_root_may_log_in(script: ModuleType, asks_again: bool) -> None:
    ok = bytes.fromhex("07 00 00 02 00 00 00 02 00 00 00")
    other = bytes.fromhex("03 00 00 02 fe 61 00")
    with server_that_answers(*([other] if asks_again else []), ok, greeting=HANDSHAKE) as port:
        assert script.mariadb_answers(port)


def test_a_mariadb_that_refuses_root_does_not_count(script: ModuleType) -> None:
    with server_that_answers(bytes.fromhex("03 00 00 02 ff 15 04"), greeting=HANDSHAKE) as port:
        assert not script.mariadb_answers(port)


def test_something_else_on_the_port_does_not_count(script: ModuleType) -> None:
    for answers in (script.rabbitmq_answers, script.postgresql_answers):
        with server_that_answers(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
            assert not answers(port)
    with server_that_answers(greeting=b"SSH-2.0-OpenSSH_9.2\r\n") as port:
        assert not script.mariadb_answers(port)


def test_nothing_on_the_port_does_not_count(script: ModuleType) -> None:
    port = script.free_port()
    for service in script.SERVICES:
        assert not service.answers(port)


def test_a_url_from_the_environment_comes_first(
    script: ModuleType, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_URL", "fake://elsewhere")
    with script.service(fake.service._replace(answers=lambda _port: True)) as url:
        assert url == "fake://elsewhere"


def test_the_server_on_the_standard_port_is_taken_next(script: ModuleType, fake: Fake, on_path) -> None:
    on_path("fake-server", "")
    with script.service(fake.service._replace(answers=lambda port: port == 1)) as url:
        assert url == "fake://127.0.0.1:1"
    assert fake.events == []


def test_a_private_server_is_started_next_and_stopped_at_the_end(script: ModuleType, fake: Fake, on_path) -> None:
    on_path("fake-server", "")
    with script.service(fake.service) as url:
        assert url == "fake://127.0.0.1:2"
        assert fake.events == ["started"]
    assert fake.events == ["started", "stopped"]


def test_a_postgresql_is_shut_down_because_a_kill_would_leave_its_shared_memory(script: ModuleType) -> None:
    code = "import signal; signal.signal(signal.SIGQUIT, lambda *_: exit(3)); print(flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        server.stdout.readline()
        script.end_postgresql(server)
        assert server.returncode == 3


def test_the_newest_of_several_versions_is_taken(script: ModuleType, fake: Fake, tmp_path: Path) -> None:
    for version in ("9", "10", "8.4"):
        binary = tmp_path / version / "fake-server"
        binary.parent.mkdir()
        binary.touch(0o755)
    wanted = fake.service._replace(binaries=("no-such-server", f"{tmp_path}/*/fake-server"))
    assert wanted.binary() == f"{tmp_path}/10/fake-server"


def test_private_takes_no_server_of_others(
    script: ModuleType, fake: Fake, on_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_path("fake-server", "")
    monkeypatch.setenv("FAKE_URL", "fake://elsewhere")
    with script.service(fake.service._replace(answers=lambda _port: True), private=True) as url:
        assert url == "fake://127.0.0.1:2"


def test_root_installs_a_server_next_without_starting_the_service(
    script: ModuleType, fake: Fake, on_path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    policy = tmp_path / "policy-rc.d"
    monkeypatch.setattr(script, "POLICY", policy)
    monkeypatch.setattr(script, "APT_LOCK", tmp_path / "lock")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    server = tmp_path / "bin" / "fake-server"
    calls = on_path("apt-get", f"test -x {policy} || exit 1\necho > {server}; /bin/chmod +x {server}")
    with script.service(fake.service) as url:
        assert url == "fake://127.0.0.1:2"
    update, install = calls.read_text().splitlines()
    assert update.endswith(" update")
    assert install.endswith(" install --no-install-recommends fake-server")
    assert not policy.exists()


def test_docker_starts_a_server_next_on_a_free_port_and_removes_it_with_its_volumes(
    script: ModuleType, fake: Fake, on_path
) -> None:
    calls = on_path(
        "docker",
        'case "$*" in *" up "*) echo "port $FAKE_PORT" >> "$0".port;;'
        ' *" down "*) echo "$COMPOSE_PROFILES" > "$0".profiles;; esac',
    )
    with script.service(fake.service) as url:
        port = url.rpartition(":")[2]
    assert (calls.parent / "bin" / "docker.port").read_text() == f"port {port}\n"
    info, version, up, down = calls.read_text().splitlines()
    assert (info, version) == ("info", "compose version")
    assert up.endswith(" up --detach --wait fake")
    assert down.endswith(" down --volumes")
    assert up.split()[:3] == down.split()[:3]  # one project, of its own
    # Without the profile a database would go on running.
    assert (calls.parent / "bin" / "docker.profiles").read_text() == "databases\n"


def test_the_last_resort_is_one_sentence_about_the_installation(script: ModuleType, fake: Fake, on_path) -> None:
    on_path("docker", "exit 1")
    with pytest.raises(script.Unavailable) as error, script.service(fake.service):
        pytest.fail("there is none")
    assert str(error.value) == (
        "There is no fake to test with: install fake-server, or Docker with Compose, or set FAKE_URL to a running one."
    )


def test_a_server_that_does_not_start_is_tried_again_and_then_quoted(script: ModuleType, on_path) -> None:
    calls = on_path("redis-server", "echo 'no luck'; exit 1")
    with pytest.raises(script.Unavailable, match=r"redis-server did not start: no luck$"), script.started(script.REDIS):
        pytest.fail("it did not start")
    assert len(calls.read_text().splitlines()) == 3


SOMEWHERE = {
    "REDIS_URL": "redis://somewhere/3",
    "RABBITMQ_URL": "amqp://user:secret@somewhere",
    "POSTGRESQL_URL": "postgresql://user:secret@somewhere/test",
    "MARIADB_URL": "mariadb://user:secret@somewhere/test",
}


def with_services(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *command],
        env={**os.environ, **SOMEWHERE},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_gets_the_urls_and_its_exit_code_is_the_script_s() -> None:
    done = with_services("sh", "-c", 'echo "$REDIS_URL $RABBITMQ_URL $POSTGRESQL_URL $MARIADB_URL"; exit 7')
    assert done.returncode == 7
    assert done.stdout.split() == list(SOMEWHERE.values())
    assert "secret" not in done.stderr


def test_a_command_ended_by_a_signal_looks_as_in_a_shell() -> None:
    assert with_services("sh", "-c", "kill -KILL $$").returncode == 128 + signal.SIGKILL


def test_a_command_that_is_not_there_is_one_sentence() -> None:
    done = with_services("no-such-command")
    assert done.returncode == 69
    assert done.stderr.splitlines()[-1] == "with_services: no-such-command can't be run: No such file or directory."


def test_sigterm_ends_the_command_too(tmp_path: Path) -> None:
    told = tmp_path / "told"
    command = f"trap 'echo yes > {told}; exit' TERM; echo ready; while :; do sleep 0.05; done"
    with subprocess.Popen(
        [sys.executable, SCRIPT, "sh", "-c", command],
        env={**os.environ, **SOMEWHERE},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        assert process.wait() == 128 + signal.SIGTERM
    assert told.read_text() == "yes\n"
