"""One among many: by a lock on a file, which the kernel takes back."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
import time

import pytest
from dramatiq.brokers.redis import RedisBroker

from dramatiq_policies.delivery.broker_state import state_of
from dramatiq_policies.observability.election import CommandElection, Election
from dramatiq_policies.observability.fleet_election import elect
from dramatiq_policies.observability.reports import parse_memory, parse_report, parse_timed_report

PROCESS = """
import os, sys, time
from dramatiq_policies.observability.election import CommandElection
election = CommandElection("queues", int(sys.argv[1]), folder=sys.argv[2])
election.publish({"me": os.getpid()})
print(election.is_leader(), flush=True)
for line in sys.stdin:
    if line == "resign\\n":
        election.resign()
    print(election.is_leader(), flush=True)
"""


class Process:
    def __init__(self, folder, master=None):
        master = os.getpid() if master is None else master
        command = [sys.executable, "-c", PROCESS, str(master), str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.won = self.answer()

    def answer(self):
        return self.process.stdout.readline() == "True\n"

    def ask(self, question="again"):
        self.process.stdin.write(f"{question}\n")
        self.process.stdin.flush()
        return self.answer()

    def kill(self):
        self.process.kill()
        self.process.wait()

    def close(self):
        self.kill()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def process(tmp_path):
    made = []

    def make(**arguments):
        made.append(Process(tmp_path, **arguments))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_process_that_wins_the_election_stays_the_leader(process):
    first, second = process(), process()
    assert (first.won, second.won) == (True, False)
    assert (first.ask(), second.ask()) == (True, False)


def test_another_process_wins_when_the_leader_is_killed(process):
    first, second, third = process(), process(), process()
    first.kill()
    assert (second.ask(), third.ask()) == (True, False)


def test_another_process_wins_when_the_leader_resigns(process):
    first, second = process(), process()
    first.process.stdin.write("resign\n")
    first.process.stdin.flush()
    # It asks again at once, and may win again; but then the file is a new one.
    assert [first.answer(), second.ask()].count(True) == 1


def test_processes_of_another_command_have_their_own_leader(process):
    assert (process(master=os.getpid()).won, process(master=os.getppid()).won) == (True, True)


def test_each_process_reads_the_reports_of_the_others_until_they_are_stale(process, tmp_path):
    others = [process(), process()]
    mine = CommandElection("queues", os.getpid(), folder=str(tmp_path))
    mine.publish({"me": os.getpid()})
    pids = {other.process.pid for other in others}
    assert {note["me"] for note in mine.reports()} == pids | {os.getpid()}
    mine.fresh_ms = 0
    time.sleep(0.01)
    assert mine.reports() == [{"me": os.getpid()}]


def test_where_no_file_can_be_made_each_elects_itself_and_says_so_once(tmp_path, caplog):
    elections = [CommandElection("queues", os.getpid(), folder=str(tmp_path / "missing")) for _ in range(2)]
    assert [election.is_leader() for election in elections] == [True, True]
    assert elections[0].is_leader()
    assert len(caplog.records) == 2


def test_a_foreign_file_or_one_of_a_live_process_is_left(tmp_path):
    mine = CommandElection("queues", os.getpid(), folder=str(tmp_path))
    left = [tmp_path / f"{mine._ours}{master}-queues" for master in ("nobody", "9" * 30, os.getppid(), 1)]
    for path in left:
        path.touch()
    assert mine.is_leader()
    assert all(path.exists() for path in left)
    mine.resign()


def test_where_a_lease_can_not_be_asked_for_each_command_elects_one_and_logs_it(monkeypatch, caplog):
    def fails(client):
        raise TypeError("an unexpected argument")

    monkeypatch.setattr("dramatiq_policies.brokers.redis.queue_reader.own_client", fails)
    election = elect(state_of(RedisBroker(url="redis://127.0.0.1:1/0")), 1_000)
    assert type(election) is Election
    assert "can't hold a lease: one process per command monitors the queues" in caplog.text


def test_a_file_removed_while_it_was_locked_elects_no_process(tmp_path, monkeypatch):
    """As whoever resigns does it: who has the old one open must not win beside who makes the new one."""
    election = CommandElection("queues", os.getpid(), folder=str(tmp_path))
    stock = fcntl.lockf

    def lock_and_lose(file, how):
        stock(file, how)
        election.path.unlink()
        election.path.touch()

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "lockf", lock_and_lose)
        assert not election.is_leader()
    assert election.is_leader()
    election.resign()


def test_a_note_that_can_not_be_read_is_none(tmp_path):
    mine = CommandElection("queues", os.getpid(), folder=str(tmp_path))
    mine.publish({"me": "here"})
    mine.path.with_name(f"{mine.path.name}.1").write_text("{")
    mine.path.with_name(f"{mine.path.name}.2").write_text('{"me": "there"}')
    assert [note["me"] for note in mine.reports()] == ["here", "there"]


#: Texts of others in the place of a report.
ODD = [
    "{",
    "",
    "5",
    "null",
    "[]",
    '"text"',
    "[1]",
    "[1, 2]",
    '[null, {"busy": 1}]',
    "[NaN, {}]",
    "[" * 100_000,
    b"\xff\xfe",
]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: str(odd[:12]))
def test_no_odd_text_is_a_note_or_an_error(odd):
    assert parse_timed_report(odd) is None
    assert parse_report(odd) is None
    assert parse_memory(odd) in (None, [])


def test_a_report_keeps_its_readable_parts():
    text = (
        '{"threads": 8, "busy": "many", "held": {"mail": 3, "odd": [], "huge": 1%s}, "me": 7, "other": {},'
        ' "taken": {"mail": ["m1", null], "late": ["m2", 5], "odd": "m", "odder": [[], 1]}}' % ("0" * 400)
    )
    assert parse_report(text) == {
        "threads": 8,
        "me": 7,
        "held": {"mail": 3},
        "taken": {"mail": ["m1", None], "late": ["m2", 5]},
    }
    assert parse_report('{"taken": 1, "held": [], "threads": -1}') == {}


def test_a_saved_memory_keeps_only_pairs_of_names():
    assert parse_memory('[["mail", "ready"], 5, ["mail"], ["mail", 1], {"a": 1}]') == [["mail", "ready"]]


def test_the_next_leader_has_the_saved_memory_for_an_hour(tmp_path):
    leader, follower = (CommandElection("queues", os.getpid(), folder=str(tmp_path)) for _ in range(2))
    assert follower.saved() is None
    leader.save([["mail", "ready"]])
    leader.resign()
    assert follower.saved() == [["mail", "ready"]]
    long_ago = time.time() - 3_700
    (file,) = tmp_path.iterdir()
    os.utime(file, (long_ago, long_ago))
    assert follower.saved() is None
    leader.save([])
    assert list(tmp_path.iterdir()) == []
    assert follower.is_leader()
    assert follower.saved() == []
    follower.resign()


def test_a_link_put_in_its_place_is_not_followed(tmp_path, caplog):
    election = CommandElection("queues", os.getpid(), folder=str(tmp_path))
    target = tmp_path / "somebody's"
    election.path.symlink_to(target)
    assert election.is_leader()
    assert not target.exists()


def test_by_default_its_files_lie_in_a_folder_that_only_this_user_enters(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / f"dramatiq-policies-{os.getuid()}"
    election = CommandElection("queues", os.getpid())
    assert not folder.exists()
    election.publish({"me": "here"})
    assert election.is_leader()
    assert election.path.parent == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()] == [0o600, 0o600]
    folder.chmod(0o777)
    election.resign()
    assert election.is_leader()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    election.resign()


@pytest.mark.parametrize("kind", ["link", "file", "other user's"])
def test_a_folder_that_is_not_this_user_s_own_is_not_entered_and_each_elects_itself(
    kind, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder, elsewhere = tmp_path / f"dramatiq-policies-{os.getuid()}", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if kind == "link":
        folder.symlink_to(elsewhere)
    elif kind == "file":
        folder.touch()
    else:
        folder.mkdir()
    elections = [CommandElection("queues", os.getpid()) for _ in range(2)]
    if kind == "other user's":
        monkeypatch.setattr("dramatiq_policies.observability.private_files.os.getuid", lambda: 4_000_000)
    for election in elections:
        election.publish({"me": "here"})
        assert election.is_leader()
        assert election.reports() == [{"me": "here"}]
    assert list(elsewhere.iterdir()) == []
    assert [record.getMessage().startswith("No process can be elected") for record in caplog.records] == [True, True]


def test_a_lock_file_of_another_user_elects_everybody_and_is_logged(tmp_path, monkeypatch, caplog):
    elections = [CommandElection("queues", os.getpid(), folder=str(tmp_path)) for _ in range(2)]
    elections[0].path.touch()
    monkeypatch.setattr("dramatiq_policies.observability.private_files.os.getuid", lambda: 4_000_000)
    assert [election.is_leader() for election in elections] == [True, True]
    assert "is a file of user" in caplog.text


def test_a_fifo_or_a_link_in_the_place_of_a_report_is_not_read_and_blocks_no_thread(tmp_path):
    mine = CommandElection("queues", os.getpid(), folder=str(tmp_path))
    os.mkfifo(mine.path.with_name(f"{mine.path.name}.1"))
    secret = tmp_path / "secret"
    secret.write_text('{"me": "secret"}')
    mine.path.with_name(f"{mine.path.name}.2").symlink_to(secret)
    os.mkfifo(mine._own.with_suffix(f"{mine._own.suffix}-new"))
    mine.publish({"me": "here"})
    assert mine.reports() == [{"me": "here"}]


def test_a_fifo_in_the_place_of_the_lock_elects_everybody(tmp_path, caplog):
    mine = CommandElection("queues", os.getpid(), folder=str(tmp_path))
    os.mkfifo(mine.path)
    assert mine.is_leader()
    assert "not a regular file" in caplog.text


def test_the_files_of_a_killed_command_are_removed_and_no_others(process, tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    left = CommandElection("queues", gone.pid, folder=str(tmp_path))
    left.path.touch()
    left.publish({})
    other = tmp_path / "dramatiq-policies-notes.txt"
    other.touch()
    neighbour = process(master=os.getppid())
    mine = CommandElection("queues", os.getpid(), folder=str(tmp_path))
    assert mine.is_leader()
    assert not left.path.exists()
    assert not left._own.exists()
    assert other.exists()
    assert neighbour.ask()
    assert CommandElection("queues", os.getppid(), folder=str(tmp_path)).path.exists()
    mine.resign()
