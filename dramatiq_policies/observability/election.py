"""Elect one leader among worker processes, and give the leader the reports of the others.

Among the worker processes of one ``dramatiq`` command, a file lock elects the leader. The kernel releases the lock when the process
dies. With Redis, a lease elects one leader for the whole fleet.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..common.clock import now_ms
from ..common.safe_logger import SafeLogger
from .private_files import lock, make_private, open_own, private_folder
from .reports import Report, parse_memory, parse_report

__all__ = ["CommandElection", "Election"]

logger = SafeLogger("dramatiq_policies.alerts")


class Election:
    """The election of a single process, always the leader. The base class of the others.

    Parameters:
      fresh_ms: The lifetime of reports and of the lease, in milliseconds.
    """

    #: Whether `reports` covers all processes. If so, no reports means no processes.
    hears_all = False

    def __init__(self, fresh_ms: int = 60_000) -> None:
        self.fresh_ms = fresh_ms
        #: The lifetime of saved state.
        self.memory_ms = max(3_600_000, 10 * fresh_ms)
        self._report: Report | None = None

    def is_leader(self) -> bool:
        """Acquire or renew leadership. Call once per interval. Return whether this process is the leader."""
        return True

    def publish(self, report: Report) -> None:
        """Publish the report of this process to the leader. Replaces the last report."""
        self._report = report

    def reports(self) -> list[Report]:
        """Return the fresh reports of all processes, including this process."""
        return [] if self._report is None else [self._report]

    def save(self, memory: Sequence[Sequence[str]]) -> None:
        """Save state for the next leader. Best effort."""

    def saved(self) -> list[list[str]] | None:
        """Return the state of the last leader, or None."""
        return None

    def resign(self) -> None:
        """Give up leadership at once."""


class CommandElection(Election):
    """One leader among the processes of one command on this host, by a file lock.

    If the file can't be made, every process becomes leader and logs a warning: a duplicate alert is better than none.

    Parameters:
      name: The purpose of the election.
      master: The process id of the common parent.
      fresh_ms: The lifetime of reports, in milliseconds. Default: 60,000.
      folder: The folder of the lock file. Default: a private folder in the temporary directory.
    """

    def __init__(self, name: str, master: int, *, fresh_ms: int = 60_000, folder: str | None = None) -> None:
        super().__init__(fresh_ms)
        # Containers may share a folder and use the same process ids.
        self._ours = f"dramatiq-policies-{os.getuid()}-{socket.gethostname()}-"
        file = f"{self._ours}{master}-{name}"
        self._private = folder is None
        self.path = Path(folder or private_folder(), file)
        self._own = self.path.with_name(f"{file}.{os.getpid()}")
        self._memory = self.path.with_name(f"{file}-memory")
        self._lock: int | None = None
        self._logged = False

    def is_leader(self) -> bool:
        if self._lock is not None:
            return True
        try:
            descriptor = self._open(self.path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            self._log(error)
            return True
        try:
            if lock(descriptor) and os.path.samestat(os.fstat(descriptor), self.path.lstat()):
                self._lock = descriptor
                self._sweep()
                return True
        except FileNotFoundError:
            pass  # A leader resigned and removed the file.
        except OSError as error:
            self._log(error)
            os.close(descriptor)
            return True
        os.close(descriptor)
        return False

    def _open(self, path: Path, flags: int) -> int:
        if self._private:
            make_private(path.parent)
        return open_own(path, flags)

    def _log(self, error: OSError) -> None:
        if not self._logged:
            self._logged = True
            logger.warning(
                "No process can be elected (%s): each process of this command monitors the queues, and alerts come several times.",
                error,
            )

    def _sweep(self) -> None:
        """Remove the files of killed commands."""
        for path in self.path.parent.glob(f"{self._ours}*"):
            master = path.name.removeprefix(self._ours).partition("-")[0]
            try:
                os.kill(int(master), 0)
            except ProcessLookupError:
                with suppress(OSError):
                    path.unlink()
            except (ValueError, OverflowError, OSError):
                continue

    def publish(self, report: Report) -> None:
        super().publish(report)
        self._write(self._own, report)

    def _write(self, path: Path, value: Any) -> None:
        with suppress(OSError):
            new = path.with_name(f"{path.name}-new")
            with os.fdopen(self._open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as file:
                json.dump(value, file)
            new.replace(path)

    def reports(self) -> list[Report]:
        found = super().reports()
        for path in self.path.parent.glob(f"{self.path.name}.*"):
            with suppress(OSError, ValueError):
                if now_ms() - path.lstat().st_mtime * 1_000 > self.fresh_ms:
                    path.unlink()
                elif path != self._own and path.suffix[1:].isdigit():
                    with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
                        report = parse_report(file.read())
                    found += [] if report is None else [report]
        return found

    def save(self, memory: Sequence[Sequence[str]]) -> None:
        if memory:
            self._write(self._memory, memory)
        else:
            with suppress(OSError):
                self._memory.unlink()

    def saved(self) -> list[list[str]] | None:
        try:
            with os.fdopen(open_own(self._memory, os.O_RDONLY), "rb") as file:
                if now_ms() - os.fstat(file.fileno()).st_mtime * 1_000 <= self.memory_ms:
                    return parse_memory(file.read())
        except FileNotFoundError:
            # The last leader has left nothing, unless the folder is missing.
            return None if self._lock is None else []
        except OSError:
            pass
        return None

    def resign(self) -> None:
        with suppress(OSError):
            self._own.unlink()
        if self._lock is not None:
            lock, self._lock = self._lock, None
            with suppress(OSError):
                self.path.unlink()
            os.close(lock)
