"""The faults, and how a run causes each."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.proxy import Proxy

from .fleet import Group
from .ledger import Freeze, Ledger
from .servers import Server

#: Milliseconds. Short, so that what comes back comes back soon.
LEASE = 4_000


def until(condition: Callable[[], Any], patience: float) -> Any:
    """Wait until the condition holds or patience ends; what it returned last."""
    give_up = time.monotonic() + patience
    while not (found := condition()) and time.monotonic() < give_up:
        time.sleep(0.05)
    return found


class Faults:
    """A method for each fault, on servers and workers that a scenario has made.

    Parameters:
      folder: Where all is kept: data, ledger, logs.
      seed: Decides which faults happen when, and to whom.
    """

    broker: Any
    store: Any

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.ledger = folder / "ledger"
        self.clock = folder / "clock"
        self.freezes: list[Freeze] = []
        self.faults: Counter[str] = Counter()
        self.groups: list[Group] = []
        self.proxies: list[Proxy] = []

    def fail(self, fault: str) -> None:
        self.faults[fault] += 1
        self.say(fault)
        getattr(self, f"_{fault}")()

    def say(self, text: str) -> None:
        with (self.folder / "faults").open("a") as stream:
            stream.write(f"{time.monotonic()} {text}\n")

    def _at_work(self, count: int) -> list[int]:
        """The worker processes whose jobs have begun; none if they are fewer than that."""
        begun = {run.process for run in Ledger.read(self.ledger).runs.values()}
        workers = [pid for one in self.groups for pid in one.workers() if pid in begun]
        return workers if len(workers) >= count else []

    def _a_worker(self) -> int | None:
        workers = until(lambda: self._at_work(1), 10.0)
        return self.random.choice(workers) if workers else None

    def _kill_worker(self) -> None:
        if (pid := self._a_worker()) is not None:
            _signal(pid, signal.SIGKILL)

    def _kill_group(self) -> None:
        self.random.choice(self.groups).kill()

    def _terminate(self) -> None:
        """SIGTERM once: a second one would end the workers at once."""
        group = self.random.choice(self.groups)
        process = group.process
        group.terminate()
        until(lambda: process.poll() is not None, 20.0)

    def _pause(self) -> None:
        """Stop a worker for less than its claims last."""
        self._stop_for(self.random.uniform(0.2, LEASE / 4_000))

    def _freeze(self) -> None:
        """Stop a worker for longer than its claims last: what it runs is begun by another."""
        since = time.monotonic()
        pid = self._stop_for(LEASE / 1_000 + self.random.uniform(1, 2))
        if pid is not None:
            self.freezes.append(Freeze(pid, since, time.monotonic()))

    def _stop_for(self, seconds: float) -> int | None:
        pid = self._a_worker()
        if pid is None or not _signal(pid, signal.SIGSTOP):
            return None
        time.sleep(seconds)
        _signal(pid, signal.SIGCONT)
        return pid

    def _restart_broker(self) -> None:
        self._restart(self.broker)

    def _restart_store(self) -> None:
        self._restart(self.store)

    def _hang_store(self) -> None:
        """The store's server takes connections and answers nothing."""
        self.store.signal(signal.SIGSTOP)
        time.sleep(self.random.uniform(1.0, LEASE / 2_000))
        self.store.signal(signal.SIGCONT)

    def _fill_store(self) -> None:
        """The store refuses writes, as one at its ``maxmemory`` does under the policy ``noeviction``."""
        with self.store.client() as client:
            client.config_set("maxmemory", "1mb")
            time.sleep(self.random.uniform(0.5, 2.0))
            client.config_set("maxmemory", "0")

    def _evict_from_store(self) -> None:
        """The store drops keys, as one at its ``maxmemory`` does under the policy ``allkeys-lru``."""
        with self.store.client() as client:
            client.config_set("maxmemory-policy", "allkeys-lru")
            self._fill_store()
            client.config_set("maxmemory-policy", "noeviction")

    def _fail_snapshot(self) -> None:
        """The store refuses writes, as one that could not write its last snapshot does."""
        with self.store.failing_snapshots():
            time.sleep(self.random.uniform(0.5, 2.0))

    def _fill_disk(self) -> None:
        with self.broker.full_disk():
            time.sleep(self.random.uniform(0.5, 2.0))

    def _raise_disk_alarm(self) -> None:
        with self.broker.disk_alarm():
            time.sleep(self.random.uniform(2.0, 4.0))

    def _slow_network(self) -> None:
        """For some seconds a byte on its way waits for 50 to 200 ms."""
        give_up = time.monotonic() + self.random.uniform(2.0, 4.0)
        while time.monotonic() < give_up:
            for proxy in self.proxies:
                proxy.stall()
            time.sleep(self.random.uniform(0.05, 0.2))
            for proxy in self.proxies:
                proxy.resume()
            time.sleep(0.005)

    def _cut_network(self) -> None:
        """Replies, or all bytes, are held and then lost, and no new connection is made for a moment."""
        proxy = self.random.choice(self.proxies)
        proxy.stall(self.random.choice((None, "to_client")))
        time.sleep(self.random.uniform(0.0, 1.0))
        proxy.refuse()
        proxy.cut()
        proxy.resume()
        time.sleep(self.random.uniform(0.0, 1.0))
        proxy.accept()

    def _step_clock(self) -> None:
        """The clock of one group of workers is wrong for a while, and then right again."""
        seconds = self.random.uniform(3, 20) * self.random.choice((-1, 1))
        self.say(f"clock {seconds:+.1f}")
        self.set_clock(seconds)
        time.sleep(self.random.uniform(1.0, 3.0))
        self.set_clock(0)

    def set_clock(self, seconds: float) -> None:
        fresh = self.clock.with_name("clock.new")
        fresh.write_text(f"{seconds:+.3f}")
        fresh.replace(self.clock)

    def _kill_node(self) -> None:
        self.broker.kill_one(self.random.uniform(0.0, 2.0), self.random)

    def _cut_off_node(self) -> None:
        """One node and the two others live, and do not see each other."""
        self.broker.cut_one_off(self.random.uniform(2.0, 5.0), self.random)

    def _fail_over(self) -> None:
        """The master loses its replicas for a moment, and then dies: they never hear of what it took meanwhile."""
        since = time.monotonic()
        died = self.broker.fail_over(self.random.uniform(0.1, 0.5))
        # A second for what it has answered last: a claim, whose job then begins.
        self.freezes.append(Freeze(None, since, died + 1.0))

    def _hang_master(self) -> None:
        """There are two masters for a while, one of which nobody hears of."""
        since = time.monotonic()
        self.broker.hang()
        self.freezes.append(Freeze(None, since, time.monotonic()))

    def _restart(self, server: Server) -> None:
        server.kill()
        time.sleep(self.random.uniform(0.0, 0.7))
        server.start()


def _signal(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
