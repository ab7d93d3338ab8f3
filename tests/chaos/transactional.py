"""Transactional jobs on PostgreSQL or MariaDB while workers and the sending process are killed and stopped: each effect once, exactly."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from dramatiq_policies.sql import create_tables
from tests.integration.databases import with_driver

from .faults import LEASE, until
from .fleet import Group, workers_of
from .ledger import Ledger
from .orders import effects_of, judge
from .run import HEARTBEAT_TIMEOUT, Chaos, Report, Scenario
from .sender import PATIENCE
from .servers import DatabaseServer, MariadbServer, PostgresqlServer

DATABASES: dict[str, type[DatabaseServer]] = {"postgresql": PostgresqlServer, "mariadb": MariadbServer}


class TransactionalChaos(Chaos):
    """The servers, the workers, a process that sends, and their failures."""

    @contextlib.contextmanager
    def servers(self, scenario: Scenario) -> Iterator[None]:
        with super().servers(scenario):
            self.database = DATABASES[scenario.database]()
            try:
                self.database.start()
                # A connection of each call: the server may have been restarted.
                self.engine = sa.create_engine(with_driver(self.database.url), poolclass=NullPool)
                yield
            finally:
                self.database.close()

    def run(self, scenario: Scenario, jobs: int) -> Report:
        """Take that many orders while faults happen, wait until all is done, and judge."""
        self.folder.mkdir(exist_ok=True)
        self.ledger.touch()
        enough = self.folder / "enough"
        with self.servers(scenario):
            environment = {
                **os.environ,
                "CHAOS_URL": self.broker.url,
                "CHAOS_STORE": self.store.url,
                "CHAOS_DATABASE": self.database.url,
                "CHAOS_LEDGER": str(self.ledger),
                "CHAOS_LEASE": str(LEASE),
                "CHAOS_HEARTBEAT_TIMEOUT": str(HEARTBEAT_TIMEOUT),
                "CHAOS_JOBS": str(jobs),
                "CHAOS_ENOUGH": str(enough),
            }
            self._make_tables()
            try:
                for number, app in enumerate(("transactional_app", "transactional_async_app")):
                    log = self.folder / f"workers-{number}.log"
                    self.groups.append(Group(environment, log, workers_of(f"tests.chaos.{app}", self.processes)))
                self.sender = Group(environment, self.folder / "sender.log", ["tests.chaos.transactional_sender"])
                until(lambda: self._at_work(2), PATIENCE)
                self._fail_while_sent(scenario, jobs, enough)
                over = time.monotonic()
                self._wait(PATIENCE)
                drained = max(0.0, Ledger.read(self.ledger).last - over)
            finally:
                unclean = sum(not one.close(20) for one in [*self.groups, self.sender])
            return Report(
                broker=self.kind,
                scenario=scenario.name,
                seed=self.seed,
                jobs=self._count("orders"),
                faults=self.faults,
                verdict=judge(*self._read(), self.broker.letters()),
                left=self.broker.left() + self._count("dramatiq_policies_outbox"),
                unclean=unclean,
                drained=drained,
            )

    def _make_tables(self) -> None:
        create_tables(self.engine)
        with self.engine.begin() as connection:
            connection.execute(sa.text("CREATE TABLE orders (number INTEGER PRIMARY KEY)"))
            connection.execute(sa.text("CREATE TABLE effects (id SERIAL PRIMARY KEY, job VARCHAR(64) NOT NULL)"))

    def _fail_while_sent(self, scenario: Scenario, jobs: int, enough: Path) -> None:
        deck: list[str] = []
        while not enough.exists() or self._count("orders") < jobs:
            deck = deck or self.random.sample(scenario.faults, len(scenario.faults))
            time.sleep(self.random.uniform(*scenario.pause))
            self.fail(deck.pop())
            if sum(self.faults.values()) >= len(scenario.faults):
                enough.touch()

    def _count(self, table: str) -> int:
        try:
            with self.engine.connect() as connection:
                return int(connection.scalar(sa.text(f"SELECT count(*) FROM {table}")) or 0)
        except sa.exc.OperationalError:
            return 0

    def _wait(self, patience: float) -> None:
        """Until all effects are there and no message is left, or for as long as that may take."""
        give_up = time.monotonic() + patience
        # RabbitMQ doesn't count messages that wait in a worker: deferrals, for a quarter of the lease at most.
        calm = LEASE / 4_000 + 1.5 if self.kind == "rabbitmq" else 0.5
        since, size = time.monotonic(), -1
        while time.monotonic() < give_up and time.monotonic() - since < calm:
            time.sleep(0.2)
            before, size = size, self.ledger.stat().st_size
            if (
                size != before
                or self.broker.waiting()
                or self._count("dramatiq_policies_outbox")
                or self._is_missing_some()
            ):
                since = time.monotonic()

    def _is_missing_some(self) -> bool:
        numbers, made = self._read()
        return any(not made[name] for number in numbers for name in effects_of(number))

    def _read(self) -> tuple[list[int], Counter[str]]:
        """The orders that were taken, and the effects that were made."""
        with self.engine.connect() as connection:
            numbers = list(connection.scalars(sa.text("SELECT number FROM orders")))
            return numbers, Counter(connection.scalars(sa.text("SELECT job FROM effects")))

    # Faults.

    def _kill_sender(self) -> None:
        self.sender.kill()

    def _restart_database(self) -> None:
        self._restart(self.database)
