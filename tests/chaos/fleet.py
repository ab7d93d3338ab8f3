"""Commands, real ``dramatiq`` workers for one, started again whenever they die."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def workers_of(app: str, processes: int, options: Sequence[str] = ()) -> list[str]:
    """The ``dramatiq`` command of an app."""
    return ["dramatiq", app, "--processes", str(processes), "--threads", "4", *options]


class Group:
    """One command and a thread that starts it again, as an operator's supervisor would.

    Parameters:
      command: A module for ``python -m``, with its arguments.
    """

    def __init__(self, environment: Mapping[str, str], log: Path, command: Sequence[str]) -> None:
        self.environment = environment
        self.log = log
        self.command = command
        self.process = self._start()
        self._stop = threading.Event()
        self._keeper = threading.Thread(target=self._keep)
        self._keeper.start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *self.command],
                env=self.environment,
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _keep(self) -> None:
        while not self._stop.wait(0.05):
            if self.process.poll() is not None:
                self._end_the_rest()
                self.process = self._start()

    def _end_the_rest(self) -> None:
        """A supervisor ends what a dead command has left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def workers(self) -> list[int]:
        """The worker processes of the command."""
        try:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        except OSError:
            return []
        found = []
        for child in map(int, children):
            with contextlib.suppress(OSError):
                if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(child)
        return found

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def terminate(self) -> None:
        self.process.terminate()

    def close(self, patience: float) -> bool:
        """Stop it as an operator would; whether that was enough."""
        self._stop.set()
        self._keeper.join()
        self.process.terminate()
        deadline = time.monotonic() + patience
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        clean = self.process.poll() is not None
        self.kill()
        self.process.wait()
        return clean
