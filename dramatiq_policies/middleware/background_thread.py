"""A middleware's thread, alive while the process has workers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dramatiq import Worker

__all__ = ["BackgroundThread"]


class BackgroundThread:
    """A daemon thread from the boot of a process's first worker to the shutdown of the last. Make a new one after a fork.

    Parameters:
      name: The thread's name, after ``dramatiq-policies-``.
      run: Called on the thread with an event. Must return soon after the event is set.

    Attributes:
      workers: The running workers.
    """

    def __init__(self, name: str, run: Callable[[threading.Event], object]) -> None:
        self._name = f"dramatiq-policies-{name}"
        self._run = run
        self.workers: list[Worker] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def add_worker(self, worker: Worker) -> bool:
        """Start the thread with the first worker. Returns whether the thread was started."""
        self.workers.append(worker)
        if self._thread is not None and not self._stop.is_set():
            return False
        # A fresh event per thread: a thread that ends late must not miss the stop.
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._stop,), name=self._name, daemon=True)
        self._thread.start()
        return True

    def remove_worker(self, worker: Worker) -> None:
        """Tell the thread to stop if this was the last worker."""
        if worker in self.workers:
            self.workers.remove(worker)
        if not self.workers:
            self._stop.set()

    def join(self, seconds: float) -> None:
        """Wait for a stopped thread. A thread in a hanging call to a server ends later."""
        if self._thread is not None and self._stop.is_set():
            self._thread.join(seconds)
            self._thread = None
