"""The owner of a claim, and whether the owner has certainly died.

An owner is ``host:pid:place:start``. The place is a digest of the boot and the pid namespace, so another container, or the
same host before a reboot, is another place. The start time tells a process from an earlier process with the same pid. About
a process in another place nothing is certain: its claims last until the lease ends.

If the place can't be read (no ``/proc``, or systemd's ``ProcSubset=pid``, which hides ``/proc/sys``), each process draws a
random place, equal to no other. A constant place would make processes of two hosts look like neighbours.
"""

from __future__ import annotations

import os
import socket
from hashlib import blake2b

__all__ = ["is_dead", "this_process"]

_known: tuple[int, str] | None = None


def this_process() -> str:
    """Return this process as an owner. A forked process is a new owner."""
    global _known  # noqa: PLW0603 - belongs to the process
    pid = os.getpid()
    known = _known
    if known is None or known[0] != pid:
        host = socket.gethostname().replace(":", "-")
        known = _known = (pid, f"{host}:{pid}:{_place() or os.urandom(6).hex()}:{_stat(pid)[1]}")
    return known[1]


def is_dead(owner: str) -> bool:
    """Return whether an owner's process has certainly died. False if unknown."""
    parts = owner.rsplit(":", 3)
    if len(parts) != 4 or not parts[3] or not parts[1].isdecimal() or parts[2] != this_process().rsplit(":", 3)[2]:
        return False
    pid, start = parts[1], parts[3]
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OverflowError, ValueError):
        return False  # No process has such a number, so dramatiq_policies did not write this owner.
    except OSError:
        pass  # The process belongs to another user, but exists.
    state, started = _stat(int(pid))
    return state in ("Z", "X") or started not in ("", start)


def _read(path: str) -> str:
    # Not by pathlib: importing pathlib would add a tenth to the import time of dramatiq_policies.
    with open(path, errors="replace") as file:  # noqa: PTH123
        return file.read()


def _place() -> str:
    """Return the digest of this place; empty if the place can't be read."""
    try:
        boot = _read("/proc/sys/kernel/random/boot_id").strip()
        namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115
    except OSError:
        return ""
    if not boot or not namespace:
        return ""
    return blake2b(f"{socket.gethostname()} {boot} {namespace}".encode(), digest_size=6).hexdigest()


def _stat(pid: int) -> tuple[str, str]:
    """Return a process' state and start (in ticks since the boot); empty if ``/proc`` can't be read."""
    try:
        # The name of the program, in parentheses, may contain anything.
        fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return "", ""
