"""The file for a liveness probe: touched while the process is well, and not when a restart would help."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from dramatiq import Worker
from dramatiq.brokers.stub import StubBroker
from dramatiq.errors import ConnectionClosed

from dramatiq_policies import ConfigurationError, Heartbeat, QueueMonitor, Timeout
from dramatiq_policies.observability import private_files

from ..support import PATIENCE, Stage

INTERVAL = 20


class Beating:
    """A worker with a heartbeat, and its file."""

    def __init__(self, folder, **arguments):
        self.path = folder / "alive"
        self.heartbeat = Heartbeat(self.path, interval=INTERVAL, **arguments)
        self.stage = Stage(bundle={"heartbeat": self.heartbeat, "timeout": Timeout(default=50, grace=20)})

    def beats(self, seconds=PATIENCE):
        """Whether the file is touched again within that time."""
        before = self._touched()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._touched() != before:
                return True
            time.sleep(0.002)
        return False

    def silent(self):
        """Whether the file is not touched in some time that is many intervals."""
        return not self.beats(15 * INTERVAL / 1_000)

    def until_silent(self):
        deadline = time.monotonic() + PATIENCE
        while not self.silent():
            assert time.monotonic() < deadline

    def _touched(self):
        return self.path.stat().st_mtime_ns if self.path.exists() else 0


@pytest.fixture
def beating(tmp_path):
    return Beating(tmp_path)


def stuck(gate):
    """As in a blocking C call: no interrupt gets in."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            while not gate.is_set():
                gate.wait(0.005)
            return
        except BaseException:
            continue


def test_the_heartbeat_goes_on_while_a_worker_is_idle_and_stops_with_it(beating):
    beating.stage.broker.declare_queue("mail")
    assert not beating.path.exists()
    with beating.stage.working():
        assert all(beating.beats() for _ in range(5))
    assert beating.silent()
    assert list(beating.path.parent.iterdir()) == [beating.path]


def test_the_heartbeat_stops_when_every_thread_is_stuck_and_goes_on_when_one_is_free(beating):
    gates = [threading.Event(), threading.Event()]

    @beating.stage.actor(max_retries=0)
    def job(number):
        stuck(gates[number])

    with beating.stage.working(threads=2):
        job.send(0)
        time.sleep(0.2)
        assert beating.beats()
        job.send(1)
        beating.until_silent()
        gates[1].set()
        assert beating.beats()
        gates[0].set()


def test_threads_that_are_busy_within_their_timeouts_are_well(beating):
    gate = threading.Event()

    @beating.stage.actor(timeout=60_000)
    def job():
        assert gate.wait(PATIENCE)

    with beating.stage.working(threads=1):
        job.send()
        assert all(beating.beats() for _ in range(10))
        gate.set()


def test_the_heartbeat_stops_when_a_consumer_is_silent(tmp_path):
    beating = Beating(tmp_path, silence=300)
    gate = threading.Event()
    gate.set()
    consume = beating.stage.broker.consume
    beating.stage.broker.declare_queue("mail")

    def hanging(*args, **kwargs):
        consumer = consume(*args, **kwargs)
        take = consumer.transport.take

        def patient():
            gate.wait(PATIENCE)
            return take()

        consumer.transport.take = patient
        return consumer

    beating.stage.broker.consume = hanging
    with beating.stage.working():
        assert beating.beats()
        gate.clear()
        beating.until_silent()
        gate.set()
        assert beating.beats()


def test_a_broker_that_is_away_does_not_stop_it(tmp_path, monkeypatch):
    monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.01)
    away = threading.Event()
    away.set()
    stock = StubBroker.consume

    def consume(self, *args, **kwargs):
        if away.is_set():
            raise ConnectionClosed("refused")
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(StubBroker, "consume", consume)
    beating = Beating(tmp_path, silence=200)
    beating.stage.broker.declare_queue("mail")
    with beating.stage.working():
        time.sleep(0.4)
        assert all(beating.beats() for _ in range(3))
        away.clear()
        assert beating.beats()


def test_the_heartbeat_stops_when_a_consumer_s_thread_has_died(beating):
    beating.stage.broker.declare_queue("mail")
    worker = Worker(beating.stage.broker, worker_timeout=50, worker_threads=1)
    worker.start()
    try:
        assert beating.beats()
        worker.consumers["mail"].stop()
        worker.consumers["mail"].join()
        beating.until_silent()
    finally:
        worker.stop()


def test_a_paused_worker_is_well(tmp_path, monkeypatch):
    monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.01)
    beating = Beating(tmp_path, silence=50)
    beating.stage.broker.declare_queue("mail")
    with beating.stage.working() as worker:
        worker.pause()
        time.sleep(0.2)
        assert beating.beats()
        worker.resume()


STUCK_NEIGHBOUR = """
import fcntl, os, sys, time
path = f"{sys.argv[1]}.{os.getpid()}"
own = os.open(path, os.O_RDWR | os.O_CREAT)
fcntl.lockf(own, fcntl.LOCK_EX)
os.utime(path, (1, 1))
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_process_does_not_speak_for_one_that_is_stuck_but_for_one_that_is_gone(beating):
    beating.stage.broker.declare_queue("mail")
    command = [sys.executable, "-c", STUCK_NEIGHBOUR, str(beating.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as neighbour:
        assert neighbour.stdout.readline() == "ready\n"
        with beating.stage.working():
            assert beating.silent()
            neighbour.kill()
            neighbour.wait()
            assert beating.beats()
    assert list(beating.path.parent.iterdir()) == [beating.path]


def test_a_folder_that_is_not_there_is_logged_once(tmp_path, caplog):
    beating = Beating(tmp_path / "missing")
    beating.stage.broker.declare_queue("mail")
    with beating.stage.working():
        time.sleep(0.2)
    assert len([record for record in caplog.records if "heartbeat" in record.getMessage()]) == 1


def test_without_arguments_it_has_a_file_in_a_folder_that_only_this_user_enters(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    heartbeat = Heartbeat(interval=INTERVAL)
    folder = tmp_path / f"dramatiq-policies-{os.getuid()}"
    assert heartbeat.path == folder / "heartbeat"
    assert not folder.exists()
    beating = Beating.__new__(Beating)
    beating.path, beating.stage = heartbeat.path, Stage(bundle={"heartbeat": heartbeat})
    beating.stage.broker.declare_queue("mail")
    with beating.stage.working():
        assert beating.beats()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(folder.iterdir()) == [heartbeat.path]


def test_the_heartbeat_stops_when_every_worker_thread_has_died_and_not_before(beating):
    """As after a SystemExit in somebody's middleware: the consumers go on."""
    beating.stage.broker.declare_queue("mail")
    worker = Worker(beating.stage.broker, worker_timeout=10, worker_threads=2)
    worker.start()
    try:
        for thread in worker.workers:
            assert beating.beats()
            thread.stop()
            thread.join()
        beating.until_silent()
        assert all(consumer.is_alive() for consumer in worker.consumers.values())
    finally:
        worker.stop()


def test_threads_that_have_died_and_threads_that_are_stuck_count_together(beating):
    gate = threading.Event()

    @beating.stage.actor(max_retries=0)
    def job():
        stuck(gate)

    worker = Worker(beating.stage.broker, worker_timeout=10, worker_threads=2)
    worker.start()
    try:
        worker.workers[0].stop()
        worker.workers[0].join()
        assert beating.beats()
        job.send()
        beating.until_silent()
        gate.set()
        assert beating.beats()
    finally:
        gate.set()
        worker.stop()


@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "other user's"])
def test_a_file_of_another_user_is_not_touched_and_logged_once(beating, kind, caplog, monkeypatch):
    target = beating.path.with_name("target")
    if kind == "link":
        beating.path.symlink_to(target)
    elif kind == "fifo":
        os.mkfifo(beating.path)
    elif kind == "folder":
        beating.path.mkdir()
    else:
        beating.path.touch()
        monkeypatch.setattr("dramatiq_policies.observability.private_files.os.getuid", lambda: 4_000_000)
    beating.stage.broker.declare_queue("mail")
    with beating.stage.working():
        assert beating.silent()
    assert not target.exists()
    assert len([record for record in caplog.records if "can't be touched" in record.getMessage()]) == 1


def test_stale_files_of_another_user_do_not_stop_it(beating, monkeypatch):
    """Such a one can be locked where everybody may write it, and not removed from a shared folder."""
    stale = [beating.path.with_name(f"alive.{suffix}") for suffix in ("99999999", "99999999-0a", "1.5", "old")]
    for path in stale:
        path.touch(0o666)
        os.utime(path, (1, 1))
    os.mkfifo(beating.path.with_name("alive.7"))
    os.utime(beating.path.with_name("alive.7"), (1, 1))
    beating.path.with_name("alive.8").symlink_to(stale[0])
    opened = private_files.open_own

    def of_another(path, *arguments):
        if path in stale:
            raise OSError(f"{path} is a file of user 4000000")
        return opened(path, *arguments)

    monkeypatch.setattr("dramatiq_policies.middleware.heartbeat.open_own", of_another)
    beating.stage.broker.declare_queue("mail")
    with beating.stage.working():
        assert all(beating.beats() for _ in range(3))
    assert all(path.exists() for path in stale)


@pytest.mark.parametrize("kind", [Heartbeat, QueueMonitor])
def test_where_files_can_not_be_locked_it_is_refused_at_construction(kind, monkeypatch):
    monkeypatch.setattr("dramatiq_policies.observability.private_files.fcntl", None)
    with pytest.raises(
        ConfigurationError, match=rf"{kind.__name__} needs locks on files .*fcntl.* Linux, macOS or in WSL"
    ):
        kind()


def test_the_default_interval_of_a_heartbeat_is_ten_seconds():
    heartbeat = Heartbeat()
    assert heartbeat.interval == 10_000
    assert not heartbeat.well()


@pytest.mark.parametrize(
    "bad", [{"path": 5}, {"path": ""}, {"interval": 0}, {"interval": 10**15}, {"interval": "1s"}, {"silence": -1}]
)
def test_a_bad_argument_of_a_heartbeat_is_refused(bad):
    with pytest.raises(ConfigurationError, match="Heartbeat"):
        Heartbeat(**{"path": Path("x"), **bad})


def test_the_heartbeat_goes_on_until_the_last_worker_of_the_process_has_stopped(beating):
    beating.stage.broker.declare_queue("mail")
    second, unstarted = (Worker(beating.stage.broker, worker_timeout=50, worker_threads=1) for _ in range(2))
    with beating.stage.working():
        second.start()
        beating.stage.broker.emit_after("worker_shutdown", unstarted)
        second.stop()
        assert beating.beats()
    assert beating.silent()


def test_the_heartbeat_needs_no_timeout_middleware(tmp_path):
    broker = StubBroker()
    heartbeat = Heartbeat(tmp_path / "alive", interval=INTERVAL)
    broker.add_middleware(heartbeat)
    worker = Worker(broker, worker_timeout=50, worker_threads=1)
    worker.start()
    try:
        assert heartbeat.well()
    finally:
        worker.stop()
    assert not heartbeat.well()


def test_a_process_whose_file_is_gone_again_is_not_waited_for(beating):
    beating.path.touch()
    gone = beating.path.with_name("alive.99999999")
    assert beating.heartbeat._allows_touch(gone)
