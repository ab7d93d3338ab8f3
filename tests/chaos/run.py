"""One scenario: jobs, nearly all sent twice, to two groups of workers while what they run on fails, and the verdict."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dramatiq import Message, group, pipeline
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import GroupCallbacks
from dramatiq.rate_limits.backends import RedisBackend as Barriers

from .fleet import Group
from .ledger import Freeze, Ledger, Verdict, judge
from .servers import RabbitmqServer, RedisServer, Server

#: Milliseconds. Short, so that what comes back comes back soon.
LEASE = 4_000
HEARTBEAT_TIMEOUT = 2_000
#: Jobs a second. Half of the threads are busy, so that an outage is caught up with.
RATE = 50
#: Seconds that the rest may take once the last fault is over.
PATIENCE = 60.0


@dataclass(frozen=True)
class Scenario:
    """What fails.

    Attributes:
      faults: The faults, one of which happens every ``pause`` seconds or so.
      pause: The shortest and the longest time between two faults, in seconds.
    """

    name: str
    faults: tuple[str, ...]
    pause: tuple[float, float] = (1.0, 3.0)


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

    HEADER = (
        f"{'broker':9} {'scenario':10} {'jobs':>6} {'faults':>6} {'lost':>5} {'doubled':>8} {'bound':>6} {'left':>5} "
        f"{'recovery, s (median / max)':>27} {'drained, s':>11}"
    )

    def row(self) -> str:
        verdict = self.verdict
        return (
            f"{self.broker:9} {self.scenario:10} {self.jobs:6} {sum(self.faults.values()):6} {len(verdict.lost):5} "
            f"{verdict.doubled:8} {verdict.bound:6} {self.left:5} {verdict.recovery():>27} {self.drained:11.1f}"
        )


class Sender:
    """Sends nearly every job twice, and again where a broker did not say that it has it.

    Attributes:
      expected: The keys whose effects must be made.
      doomed: The ids of the messages that must end as dead letters.
      jobs: How many jobs were sent: as many as were wanted, and on until `enough` is set.
    """

    def __init__(self, broker: Any, store: str, jobs: int) -> None:
        self.broker = broker
        broker.add_middleware(GroupCallbacks(Barriers(url=store)))
        broker.declare_queue("jobs")
        self.wanted = jobs
        self.enough = threading.Event()
        self.expected: list[str] = []
        self.doomed: list[str] = []
        self.jobs = 0
        self.failed: BaseException | None = None
        self.thread = threading.Thread(target=self._send_all)

    def _send_all(self) -> None:
        started = time.monotonic()
        try:
            while self.jobs < self.wanted or not self.enough.is_set():
                self._send_job(self.jobs)
                time.sleep(max(0.0, started + self.jobs / RATE - time.monotonic()))
        except BaseException as error:
            self.failed = error

    def _send_job(self, number: int) -> None:
        kind = number % 20
        self.jobs += 1
        if kind in (0, 1, 2):
            self._twice("flaky", number)
        elif kind == 3:
            self.doomed += self._twice("hopeless", number, effect=False)
        elif kind in (4, 5):
            self._expect("first", number)
            self._expect("second", number)
            for _ in range(1 if kind == 5 else 2):
                self._insist(lambda: pipeline([message("first", number), message("second")], broker=self.broker).run())
        elif kind == 6:
            members = range(number * 1_000, number * 1_000 + 3)
            self._expect("together", number)
            for one in members:
                self._expect("member", one)
            for _ in range(2):

                def run() -> None:
                    some = group([message("member", one) for one in members], broker=self.broker)
                    some.add_completion_callback(message("together", number))
                    some.run()

                self._insist(run)
        elif kind == 7:
            self._once("unguarded", number)
        elif kind == 8:
            # A twin could stand in for what is lost; these have none.
            self._once("flaky", number)
        else:
            self._twice("plain", number)

    def _expect(self, actor: str, number: int) -> None:
        self.expected.append(f"{actor}:{number}")

    def _once(self, actor: str, number: int) -> None:
        self._expect(actor, number)
        one = message(actor, number)
        self._insist(lambda: self.broker.enqueue(one))

    def _twice(self, actor: str, number: int, *, effect: bool = True) -> list[str]:
        if effect:
            self._expect(actor, number)
        sent = []
        for _ in range(2):
            one = message(actor, number)
            self._insist(lambda one=one: self.broker.enqueue(one))
            sent.append(one.message_id)
        return sent

    def _insist(self, send: Callable[[], Any]) -> None:
        give_up = time.monotonic() + PATIENCE
        while True:
            try:
                send()
                return
            except Exception:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.1)


def until(condition: Callable[[], Any], patience: float) -> Any:
    """Wait until the condition holds or patience ends; what it returned last."""
    give_up = time.monotonic() + patience
    while not (found := condition()) and time.monotonic() < give_up:
        time.sleep(0.05)
    return found


def message(actor: str, *args: object) -> Message[Any]:
    return Message("jobs", actor, args, {}, {})


class Chaos:
    """The servers, the workers and their failures.

    Parameters:
      kind: Which broker.
      folder: Where all is kept: data, ledger, logs.
      seed: Decides which faults happen when, and to whom.
      processes: Of each of the two groups.
    """

    def __init__(self, kind: str, folder: Path, seed: int, *, processes: int = 1) -> None:
        self.kind = kind
        self.folder = folder
        self.random = random.Random(seed)
        self.seed = seed
        self.processes = processes
        self.ledger = folder / "ledger"
        self.freezes: list[Freeze] = []
        self.faults: Counter[str] = Counter()
        self.groups: list[Group] = []

    @contextlib.contextmanager
    def servers(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            self.store = RedisServer(self.folder / "redis")
            stack.callback(self.store.close)
            self.store.start()
            self.broker: Any = self.store
            if self.kind == "rabbitmq":
                self.broker = RabbitmqServer(self.folder / "rabbitmq")
                stack.callback(self.broker.close)
                self.broker.start()
            yield

    def producer(self) -> Any:
        if self.kind == "rabbitmq":
            return RabbitmqBroker(url=self.broker.url, confirm_delivery=True, middleware=[])
        return RedisBroker(url=self.broker.url, middleware=[])

    def run(self, scenario: Scenario, jobs: int) -> Report:
        """Send that many jobs while faults happen, wait until all is done, and judge."""
        self.folder.mkdir(exist_ok=True)
        self.ledger.touch()
        with self.servers():
            sender = Sender(self.producer(), self.store.url, jobs)
            environment = {
                **os.environ,
                "CHAOS_BROKER": self.kind,
                "CHAOS_URL": self.broker.url,
                "CHAOS_STORE": self.store.url,
                "CHAOS_LEDGER": str(self.ledger),
                "CHAOS_LEASE": str(LEASE),
                "CHAOS_HEARTBEAT_TIMEOUT": str(HEARTBEAT_TIMEOUT),
            }
            self.groups = [
                Group(environment, self.folder / f"workers-{number}.log", self.processes) for number in range(2)
            ]
            try:
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
                self.wait(sender)
                drained = max(0.0, Ledger.read(self.ledger).last - over)
            finally:
                sender.enough.set()
                unclean = sum(not one.close(20) for one in self.groups)
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

    def wait(self, sender: Sender) -> None:
        """Until nothing is left to be done, or for as long as that may take."""
        give_up = time.monotonic() + PATIENCE
        # What waits in a worker of RabbitMQ can't be counted there: a deferral, of a quarter of the lease at most.
        calm = 0.3 if self.kind == "redis" else LEASE / 4_000 + 1.5
        since = time.monotonic()
        size = -1
        while time.monotonic() < give_up and time.monotonic() - since < calm:
            time.sleep(0.1)
            if self.ledger.stat().st_size != size or self.broker.waiting() or not self._all_done(sender):
                since, size = time.monotonic(), self.ledger.stat().st_size

    def _all_done(self, sender: Sender) -> bool:
        effects = Ledger.read(self.ledger).effects()
        return all(effects[key] for key in sender.expected)

    # Faults.

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
        self.random.choice(self.groups).terminate()

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
