"""Touch a file while the worker is well, for a liveness probe."""

from __future__ import annotations

import os
import re
import threading
import time
from contextlib import suppress
from datetime import timedelta
from secrets import token_hex
from typing import TYPE_CHECKING

from dramatiq.errors import ConnectionClosed

from ..brokers.readers import reader_of
from ..common.durations import CENTURY_MS
from ..common.forks import after_fork
from ..common.safe_logger import SafeLogger
from ..delivery.consumer import PolicyConsumer
from ..errors import ConfigurationError, checked_duration
from ..observability.private_files import lock, make_private, open_own, private_folder, require_file_locks
from .background_thread import BackgroundThread
from .base import PolicyMiddleware

if TYPE_CHECKING:
    from pathlib import Path

    from dramatiq import Worker
    from dramatiq.broker import Broker
    from typing_extensions import Self

    from ..delivery.broker_state import BrokerState

__all__ = ["Heartbeat"]

logger = SafeLogger("dramatiq_policies.alerts")

#: ``.<pid>`` or ``.<pid>-<random>``, the suffix of a process's own file.
_OWN_SUFFIX = re.compile(r"\.\d+(-[0-9a-f]+)?")


class Heartbeat(PolicyMiddleware):
    """Touch a file at an interval, as long as every worker process of the command is well::

        install(broker, heartbeat=Heartbeat("/run/worker/heartbeat"))

    A liveness probe restarts the worker when the file is older than a few intervals. A process is not well if

    - messages that the broker refuses in every form hold all slots of a queue,
    - every worker thread has died or runs a stuck job (past its timeout and the grace, out of reach of interrupts), or
    - a consumer thread has died, or was silent for longer than ``silence`` although the broker answers on a new connection.

    A process is well while it is idle or busy, while it shuts down and finishes its jobs, and while the broker is down: a restart
    would not help.

    Each process also keeps a file of its own, ``<path>.<pid>-…``, so that other processes of the command do not hide a stuck
    process.

    Parameters:
      path: A regular file of this user, no link. Its folder must exist. Default ``dramatiq-policies-<uid>/heartbeat`` in the
        temporary directory; only this user and root can read that folder.
      interval: The time between two touches, in milliseconds or as a ``timedelta``. Default 10 seconds.
      silence: The longest silence of a consumer, in milliseconds or as a ``timedelta``. Default 5 minutes.

    Raises:
      ConfigurationError: An argument is wrong, or the platform has no ``fcntl`` (Windows).
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        interval: int | timedelta = 10_000,
        *,
        silence: int | timedelta = 300_000,
    ) -> None:
        from pathlib import Path  # costs time at each import; see owner.py

        require_file_locks("Heartbeat")
        self._private = path is None
        if path is None:
            path = private_folder() / "heartbeat"
        try:
            self.path = Path(path)
            if not self.path.name:
                raise TypeError  # A folder.
        except TypeError:
            raise ConfigurationError.of_option("Heartbeat", "path", "the path of a file", path) from None
        self.interval = checked_duration("Heartbeat", "interval", interval, least=1, most=CENTURY_MS)
        self.silence = checked_duration("Heartbeat", "silence", silence, least=1, most=CENTURY_MS)
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        """Forget the broker and its workers."""
        self._thread = BackgroundThread("heartbeat", self._beat)
        self._own: int | None = None
        self._own_path: Path | None = None
        self._failing = False
        self._since = 0.0

    def for_stub(self) -> Self:
        stub = super().for_stub()
        stub.reset_after_fork()
        after_fork(stub)
        return stub

    def attach(self, state: BrokerState) -> None:
        state.last_polled_at = {}

    def after_worker_boot(self, broker: Broker, worker: Worker) -> None:
        if not self._thread.workers:
            self._since = time.monotonic()
        self._thread.add_worker(worker)

    def after_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        self._thread.remove_worker(worker)
        self._thread.join(2)

    def well(self) -> bool:
        """Return whether this process is well; False before its worker has started."""
        state = self.attached_to
        if state is None or not self._thread.workers:
            return False
        stuck = 0 if state.timeout is None else len(state.timeout.still_stuck())
        if state.stopping.is_set():
            return stuck < sum(worker.worker_threads for worker in self._thread.workers)
        if stuck >= sum(thread.is_alive() for worker in self._thread.workers for thread in worker.workers):
            return False
        now, polled = time.monotonic(), state.last_polled_at or {}
        silent = False
        for worker in self._thread.workers:
            for queue, consumer in list(worker.consumers.items()):
                if consumer.paused:
                    continue
                if not consumer.is_alive():
                    return False
                if isinstance(consumer.consumer, PolicyConsumer) and consumer.consumer.transport.is_stalled():
                    return False
                silent = silent or (now - max(self._since, polled.get(queue, 0.0))) * 1_000 > self.silence
        return not (silent and _answers(state.broker))

    def _beat(self, stop: threading.Event) -> None:
        try:
            while True:
                try:
                    if self.well():
                        self._touch()
                    self._failing = False
                except Exception as error:
                    if not self._failing:
                        self._failing = True
                        logger.error(  # noqa: TRY400
                            "The heartbeat file %s can't be touched (%s). A liveness probe takes this worker for dead.",
                            self.path,
                            error,
                        )
                if stop.wait(self.interval / 1_000):
                    return
        finally:
            if self._own is not None:
                if self._own_path is not None:
                    with suppress(OSError):
                        self._own_path.unlink()
                os.close(self._own)
                self._own = None

    def _touch(self) -> None:
        if self._private:
            make_private(self.path.parent)
        if self._own is None:
            # The process id is not enough: a process of another user or container may have the same.
            self._own_path = self.path.with_name(f"{self.path.name}.{os.getpid()}-{token_hex(4)}")
            self._own = open_own(self._own_path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            # The lock tells other processes that this process lives, even if its id is reused later.
            lock(self._own)
        os.utime(self._own)
        if all(self._allows_touch(path) for path in self.path.parent.glob(f"{self.path.name}.*")):
            shared = open_own(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.utime(shared)
            finally:
                os.close(shared)

    def _allows_touch(self, path: Path) -> bool:
        """Return False for an old file of a living process, and True for any other file."""
        if path == self._own_path or not _OWN_SUFFIX.fullmatch(path.suffix):
            return True
        try:
            if time.time() - path.lstat().st_mtime <= 3 * self.interval / 1_000:
                return True
            other = open_own(path, os.O_RDWR)
        except OSError:
            return True
        try:
            if not lock(other):
                return False
            with suppress(OSError):
                path.unlink()
            return True
        finally:
            os.close(other)


def _answers(broker: Broker) -> bool:
    """Return whether the broker's server answers on a new connection."""
    reader = reader_of(broker)
    try:
        reader.read_all(reader.queues()[:1])
    except ConnectionClosed:
        return False
    finally:
        reader.close()
    return True
