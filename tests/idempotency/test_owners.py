"""Whether the process that holds a claim is certainly gone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dramatiq_policies.idempotency import owner as owners

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only /proc says when a process started")


def changed(owner, *, pid=None, place=None, start=None):
    host, *parts = owner.rsplit(":", 3)
    given = (pid, place, start)
    return ":".join([host, *(old if new is None else str(new) for old, new in zip(parts, given, strict=True))])


def test_the_own_process_lives_and_has_one_identity_in_all_threads():
    found = []
    thread = threading.Thread(target=lambda: found.append(owners.this_process()))
    thread.start()
    thread.join()
    assert found == [owners.this_process()]
    assert not owners.is_dead(owners.this_process())


def owner_of(pid):
    return changed(owners.this_process(), pid=pid, start=owners._stat(pid)[1])


def test_a_process_is_dead_once_it_is_gone_or_a_zombie():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = owner_of(child.pid)
    assert not owners.is_dead(owner)
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert owners._stat(child.pid)[0] == "Z"
    assert owners.is_dead(owner)
    child.wait()
    assert owners.is_dead(owner)


def test_another_process_with_the_same_pid_is_not_taken_for_the_owner():
    start = int(owners._stat(os.getpid())[1])
    assert owners.is_dead(changed(owners.this_process(), start=start - 1))


@pytest.mark.parametrize("pid", [10**20, "9" * 5_000])
def test_a_pid_that_no_process_has_is_never_certainly_dead(pid):
    assert not owners.is_dead(changed(owners.this_process(), pid=pid))


@pytest.mark.parametrize("pid", [2**22 - 1, os.getpid()], ids=["nobody", "ours"])
def test_a_process_in_another_container_or_before_a_reboot_is_never_certainly_dead(pid):
    assert not owners.is_dead(changed(owners.this_process(), pid=pid, place="0123456789ab", start=1))


@pytest.mark.parametrize("what", ["hostname", "namespace", "boot"])
def test_the_place_is_of_the_host_the_boot_and_the_namespace_of_pids(monkeypatch, what):
    before = owners._place()
    if what == "hostname":
        monkeypatch.setattr(owners.socket, "gethostname", lambda: "elsewhere")
    elif what == "namespace":
        monkeypatch.setattr(owners.os, "readlink", lambda path: "pid:[1]")
    else:
        monkeypatch.setattr(owners, "_read", lambda path: "another boot\n")
    assert owners._place() != before


def test_where_proc_can_not_be_read_nothing_is_certain(monkeypatch):
    assert not owners.is_dead("host:4194303:place:")
    owner = changed(owners.this_process(), start=1)
    monkeypatch.setattr(owners, "_stat", lambda pid: ("", ""))
    assert not owners.is_dead(owner)


def test_a_process_of_another_user_is_alive(monkeypatch):
    def refuse(pid, signal):
        raise PermissionError

    owner = owners.this_process()
    monkeypatch.setattr(os, "kill", refuse)
    assert not owners.is_dead(owner)


def test_a_hosts_name_with_colons_is_read_all_the_same(monkeypatch):
    monkeypatch.setattr(owners, "_known", None)
    monkeypatch.setattr(owners.socket, "gethostname", lambda: "fe80::1")
    owner = owners.this_process()
    assert not owners.is_dead(owner)
    assert owners.is_dead(changed(owner, start=1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # a fork beside threads
def test_a_forked_child_is_another_owner():
    parent = owners.this_process()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, f"{owners.this_process()} {owners.is_dead(parent)}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        owner, parent_is_dead = answer.read().rsplit(" ", 1)
    os.waitpid(child, 0)
    assert parent_is_dead == "False"
    assert owner.rsplit(":", 3)[1] == str(child)
    assert owners.is_dead(owner)


def test_an_owner_on_an_unknown_machine_is_never_certainly_dead(monkeypatch):
    owner = changed(owners.this_process(), pid=2**22 + 1)
    assert owners.is_dead(owner)

    def unreadable(path):
        raise PermissionError(path)

    monkeypatch.setattr(owners, "_read", unreadable)
    assert owners._place() == ""
    assert owners._stat(os.getpid()) == ("", "")


HIDDEN = {
    "/proc/sys": lambda path: path.startswith("/proc/sys/"),
    "/proc/self/ns": lambda path: path.startswith("/proc/self/ns/"),
    "/proc": lambda path: True,
}


@pytest.fixture(params=HIDDEN)
def hidden_place(request, monkeypatch):
    """A host on which a process can't read where it is."""
    read, readlink, is_hidden = owners._read, os.readlink, HIDDEN[request.param]

    def refuse(path, ask):
        if is_hidden(path):
            raise FileNotFoundError(path)
        return ask(path)

    monkeypatch.setattr(owners, "_read", lambda path: refuse(path, read))
    monkeypatch.setattr(owners.os, "readlink", lambda path: refuse(path, readlink))
    monkeypatch.setattr(owners, "_known", None)


def test_where_the_place_is_hidden_no_process_of_a_host_that_hides_it_too_is_certainly_dead(hidden_place, monkeypatch):
    theirs = changed(owners.this_process(), pid=2**22 - 1, start=1)
    monkeypatch.setattr(owners, "_known", None)  # The other host.
    assert not owners.is_dead(theirs)
    assert not owners.is_dead(f"host:{2**22 - 1}::1")  # As version 0.1.0 writes it there.
    assert owners.this_process().rsplit(":", 3)[2] != ""  # Version 0.1.0 takes "" for its own place.


def test_where_the_place_is_hidden_two_processes_of_one_pid_and_start_are_two_owners(hidden_place, monkeypatch):
    one = owners.this_process()
    assert owners.this_process() == one
    assert not owners.is_dead(one)
    monkeypatch.setattr(owners, "_known", None)
    assert owners.this_process() != one


def test_an_empty_boot_id_names_no_place(monkeypatch):
    monkeypatch.setattr(owners, "_read", lambda path: "\n")
    assert owners._place() == ""
