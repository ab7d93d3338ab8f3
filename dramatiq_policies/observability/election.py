"""Elect one leader among worker processes, and give the leader the reports of the others.

Among the worker processes of one ``dramatiq`` command, a file lock elects the leader. The kernel releases the lock when the process
dies. With Redis, a lease elects one leader for the whole fleet.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from .._dramatiq import kind_of
from ..common.safe_logger import SafeLogger
from ..delivery.history import now_ms
from .private_files import lock, make_private, open_own, private_folder
from .reports import Report, parse_memory, parse_report, parse_timed_report

if TYPE_CHECKING:
    from dramatiq.broker import Broker

    from ..delivery.broker_state import BrokerState

__all__ = ["CommandElection", "Election", "FleetElection", "elect"]

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
            logger.warning("No process can be elected (%s): each process of this command monitors the queues.", error)

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
        with suppress(OSError), os.fdopen(open_own(self._memory, os.O_RDONLY), "rb") as file:
            if now_ms() - os.fstat(file.fileno()).st_mtime * 1_000 <= self.memory_ms:
                return parse_memory(file.read())
        return None

    def resign(self) -> None:
        with suppress(OSError):
            self._own.unlink()
        if self._lock is not None:
            lock, self._lock = self._lock, None
            with suppress(OSError):
                self.path.unlink()
            os.close(lock)


class FleetElection(Election):
    """One leader among all processes with the same key on the same Redis, by a lease.

    While Redis can't be reached, each command has its own leader.

    Parameters:
      client: A client of redis-py, used only by this election.
      key: The prefix of the Redis keys.
      fallback: The election of this command, used while Redis is down.
      fresh_ms: The lifetime of the lease and of reports, in milliseconds.
    """

    hears_all = True

    def __init__(self, client: Any, key: str, fallback: Election, *, fresh_ms: int) -> None:
        super().__init__(fresh_ms)
        self.client = client
        self.key = key
        self.fallback = fallback
        self.me = f"{socket.gethostname()}:{os.getpid()}:{uuid4()}"
        from importlib import resources

        from redis import RedisError

        self._outage = (RedisError, OSError)
        self._lease = client.register_script(resources.files(__package__).joinpath("lease.lua").read_text())

    def is_leader(self) -> bool:
        try:
            won = bool(self._lease(keys=[self.key], args=[self.me, self.fresh_ms]))
        except self._outage:
            return self.fallback.is_leader()
        if not won:
            self.fallback.resign()
        return won

    def publish(self, report: Report) -> None:
        try:
            with self.client.pipeline() as both:
                both.hset(f"{self.key}:notes", self.me, json.dumps([now_ms(), report]))
                both.pexpire(f"{self.key}:notes", self.fresh_ms).execute()
        except self._outage:
            self.fallback.publish(report)

    def reports(self) -> list[Report]:
        try:
            found = []
            for worker, text in self.client.hgetall(f"{self.key}:notes").items():
                timed = parse_timed_report(text)
                if timed is None:
                    continue
                if now_ms() - timed[0] <= self.fresh_ms:
                    found.append(timed[1])
                else:
                    self.client.hdel(f"{self.key}:notes", worker)
        except (*self._outage, ValueError):
            return self.fallback.reports()
        return found

    def save(self, memory: Sequence[Sequence[str]]) -> None:
        self.fallback.save(memory)
        with suppress(*self._outage):
            self.client.set(f"{self.key}:memory", json.dumps(memory), px=self.memory_ms)

    def saved(self) -> list[list[str]] | None:
        try:
            text = self.client.get(f"{self.key}:memory")
            return None if text is None else parse_memory(text)
        except (*self._outage, ValueError):
            return self.fallback.saved()

    def resign(self) -> None:
        self.fallback.resign()
        with suppress(*self._outage):
            self.client.hdel(f"{self.key}:notes", self.me)
            self._lease(keys=[self.key], args=[self.me, 0])
        self.client.connection_pool.disconnect()


def elect(state: BrokerState, interval: int) -> Election:
    """Return the election of the queue monitor: of the fleet, of this command, or of this process alone.

    Parameters:
      state: The state of the broker.
      interval: The time between two calls of `Election.is_leader`, in milliseconds.
    """
    fresh = max(1_000, 3 * interval)
    queues = "\n".join(sorted(state.broker.get_declared_queues()))
    name = f"queues-{hashlib.blake2b(queues.encode(), digest_size=6).hexdigest()}"
    fallback = CommandElection(name, os.getppid(), fresh_ms=fresh) if state.in_command else Election(fresh)
    at_hand = _redis_of(state.broker)
    if at_hand is None:
        return fallback
    from ..brokers.redis.queue_reader import own_client

    client, namespace = at_hand
    try:
        return FleetElection(own_client(client), f"{namespace}:__monitor__.{name}", fallback, fresh_ms=fresh)
    except Exception:
        logger.exception(
            "A %s can't hold a lease: one process per command monitors the queues, not one per fleet.",
            type(client).__name__,
        )
        return fallback


def _redis_of(broker: Broker) -> tuple[Any, str] | None:
    """Return the Redis client and namespace of the broker or of a store, or None."""
    stores = (getattr(middleware, "store", None) for middleware in broker.middleware)
    for place in (broker if kind_of(broker) == "redis" else None, *stores):
        # No ``getattr``: a RedisBroker turns each unknown name into a command.
        known = getattr(place, "__dict__", {})
        if hasattr(known.get("client"), "connection_pool"):
            return known["client"], str(known.get("namespace", "dramatiq"))
    return None
