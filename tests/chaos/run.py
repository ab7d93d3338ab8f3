"""One scenario: jobs, nearly all sent twice, to two groups of workers while what they run on fails, and the verdict."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker

from tests.proxy import Proxy

from .clients import redis_client
from .clusters import RabbitmqCluster, RedisBehindSentinel
from .faults import LEASE, Faults, until
from .fleet import Group, workers_of
from .ledger import Ledger, Verdict, judge
from .sender import PATIENCE, Sender
from .servers import RabbitmqServer, RedisServer

HEARTBEAT_TIMEOUT = 2_000
#: Of processes whose clock is wrong.
WRONG_CLOCK = Path(__file__).with_name("wrong_clock")


@dataclass(frozen=True)
class Scenario:
    """The faults of a run.

    Attributes:
      faults: The faults, one of which happens every ``pause`` seconds or so.
      pause: The shortest and the longest time between two faults, in seconds.
      late: Seconds that some of the jobs take at most; a worker that is told to stop waits for one second.
      replicas: How many of Redis' replicas must have a message before it counts as sent.
      min_replicas: Without how many of them a Redis master takes no writes.
      database: Of transactional jobs, ``postgresql`` or ``mariadb``: then nothing excuses a doubled effect.
      loses: What is set wrongly here, so that jobs are lost or doubled, and the docs say so; empty if nothing is.
    """

    name: str
    faults: tuple[str, ...]
    pause: tuple[float, float] = (1.0, 3.0)
    late: float = 0.0
    replicas: int = 0
    min_replicas: int = 0
    loses: str = ""
    database: str = ""


@dataclass
class Report:
    """How a scenario went."""

    broker: str
    scenario: str
    seed: int
    jobs: int
    faults: Counter[str]
    verdict: Verdict
    left: int
    unclean: int
    drained: float
    outcomes: Counter[str] = field(default_factory=Counter)

    @property
    def wrong(self) -> dict[str, Any]:
        wrong = dict(self.verdict.wrong)
        if self.left:
            wrong["left in the queues"] = self.left
        if self.unclean:
            wrong["groups that did not stop"] = self.unclean
        return wrong

    #: Of the table in docs/chaos.md, which is a run's output.
    HEADER = (
        "| broker | scenario | jobs | faults | lost | doubled | bound | recovery, s | drained, s |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )

    def row(self) -> str:
        verdict = self.verdict
        return (
            f"| {self.broker} | {self.scenario} | {self.jobs} | {sum(self.faults.values())} | {len(verdict.lost)} "
            f"| {verdict.doubled} | {verdict.bound} | {verdict.recovery()} | {self.drained:.1f} |"
        )


class Chaos(Faults):
    """The servers, the workers and their failures.

    Parameters:
      kind: Which broker: ``redis``, ``sentinel``, ``rabbitmq`` or ``cluster``.
      folder: Where all is kept: data, ledger, logs.
      seed: Decides which faults happen when, and to whom.
      processes: Of each of the two groups.
    """

    def __init__(self, kind: str, folder: Path, seed: int, *, processes: int = 1) -> None:
        super().__init__(folder, seed)
        self.kind = kind
        self.seed = seed
        self.processes = processes

    @contextlib.contextmanager
    def servers(self, scenario: Scenario) -> Iterator[None]:
        with contextlib.ExitStack() as stack:

            def started(server: Any) -> Any:
                stack.callback(server.close)
                server.start()
                return server

            if "fill_disk" in scenario.faults:
                stack.enter_context(_disk(self.folder / self.kind))
            if self.kind == "sentinel":
                self.broker = self.store = started(RedisBehindSentinel(self.folder / "sentinel", scenario.min_replicas))
            else:
                self.broker = self.store = started(RedisServer(self.folder / "redis" / "data"))
            if self.kind == "rabbitmq":
                self.broker = started(RabbitmqServer(self.folder / "rabbitmq" / "data"))
            elif self.kind == "cluster":
                self.broker = started(RabbitmqCluster(self.folder / "rabbitmq"))
            yield

    def producer(self) -> Any:
        if self.broker.url.startswith("amqp"):
            return RabbitmqBroker(url=self.broker.url, confirm_delivery=True, middleware=[])
        return RedisBroker(client=redis_client(self.broker.url), middleware=[])

    def start_workers(self, scenario: Scenario) -> None:
        urls = {"CHAOS_URL": self.broker.url, "CHAOS_STORE": self.store.url}
        if any(fault.endswith("_network") for fault in scenario.faults):
            proxies = {url: Proxy.before(url) for url in set(urls.values())}
            self.proxies = list(proxies.values())
            urls = {name: proxies[url].url for name, url in urls.items()}
        environment = {
            **os.environ,
            **urls,
            "CHAOS_LEDGER": str(self.ledger),
            "CHAOS_LEASE": str(LEASE),
            "CHAOS_LATE": str(scenario.late),
            "CHAOS_HEARTBEAT_TIMEOUT": str(HEARTBEAT_TIMEOUT),
        }
        wrong_clock = {}
        if "step_clock" in scenario.faults:
            self.set_clock(0)
            wrong_clock = {"PYTHONPATH": str(WRONG_CLOCK), "CHAOS_CLOCK": str(self.clock)}
        options = ["--worker-shutdown-timeout", "1000"] if scenario.late else []
        for number, own in enumerate(({}, wrong_clock)):
            log = self.folder / f"workers-{number}.log"
            command = workers_of("tests.chaos.app", self.processes, options)
            self.groups.append(Group({**environment, **own}, log, command))

    def run(self, scenario: Scenario, jobs: int) -> Report:
        """Send that many jobs while faults happen, wait until all is done, and judge."""
        self.folder.mkdir(exist_ok=True)
        self.ledger.touch()
        with self.servers(scenario):
            sender = Sender(self.producer(), self.store.url, jobs, replicas=scenario.replicas)
            try:
                self.start_workers(scenario)
                sender.thread.start()
                until(lambda: self._at_work(2), PATIENCE)
                deck: list[str] = []
                while sender.thread.is_alive():
                    if not deck:
                        # All of them, in another order each time.
                        deck = self.random.sample(scenario.faults, len(scenario.faults))
                    sender.thread.join(self.random.uniform(*scenario.pause))
                    if sender.thread.is_alive():
                        self.fail(deck.pop())
                        if sum(self.faults.values()) == len(scenario.faults):
                            sender.enough.set()
                over = time.monotonic()
                if sender.failed is not None:
                    raise sender.failed
                self.wait(sender, 15.0 if scenario.loses else PATIENCE)
                drained = max(0.0, Ledger.read(self.ledger).last - over)
            finally:
                sender.enough.set()
                unclean = sum(not one.close(20) for one in self.groups)
                for proxy in self.proxies:
                    proxy.close()
                sender.thread.join()
                sender.broker.close()
            ledger = Ledger.read(self.ledger)
            return Report(
                broker=self.kind,
                scenario=scenario.name,
                seed=self.seed,
                jobs=sender.jobs,
                faults=self.faults,
                verdict=judge(ledger, sender.expected, sender.doomed, self.broker.letters(), self.freezes),
                left=self.broker.left(),
                unclean=unclean,
                drained=drained,
                outcomes=ledger.outcomes,
            )

    def wait(self, sender: Sender, patience: float) -> None:
        """Until nothing is left to be done, or for as long as that may take."""
        give_up = time.monotonic() + patience
        # RabbitMQ doesn't count messages that wait in a worker: deferrals, for a quarter of the lease at most.
        calm = LEASE / 4_000 + 1.5 if self.broker.url.startswith("amqp") else 0.3
        since = time.monotonic()
        size = -1
        while time.monotonic() < give_up and time.monotonic() - since < calm:
            time.sleep(0.1)
            if self.ledger.stat().st_size != size or self.broker.waiting() or not self._all_done(sender):
                since, size = time.monotonic(), self.ledger.stat().st_size

    def _all_done(self, sender: Sender) -> bool:
        effects = Ledger.read(self.ledger).effects()
        return all(effects[key] for key in sender.expected)


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """A small disk of its own, which only root can make."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "dramatiq-chaos", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
