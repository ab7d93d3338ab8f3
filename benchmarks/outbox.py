"""The outbox: relaying rows beside sending messages one by one, and a send in a transaction beside a plain send.

    python -m benchmarks.outbox [--rows 10000] [--rounds 3] [--brokers redis rabbitmq] [--databases postgresql mariadb sqlite]

Each measurement has its own process, database (or file) and queues. Within a process the two compared ways take turns. Needs Redis, RabbitMQ, PostgreSQL and MariaDB (REDIS_URL, RABBITMQ_URL, POSTGRESQL_URL, MARIADB_URL; by
default the local servers).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dramatiq
import sqlalchemy as sa
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from sqlalchemy.orm import Session

from dramatiq_policies import install
from dramatiq_policies.sql import SqlOutbox, create_tables
from dramatiq_policies.transactions.relay import Relay

from . import rounds
from .measurement import queue_of_its_own
from .variants import RABBITMQ_URL, REDIS_URL

__all__ = ["main"]

DATABASES = {
    "postgresql": os.environ.get("POSTGRESQL_URL", "postgresql://postgres@127.0.0.1:5432/postgres"),
    "mariadb": os.environ.get("MARIADB_URL", "mariadb://root@127.0.0.1:3306/mysql"),
}
DRIVERS = {"postgresql": "postgresql+psycopg", "mariadb": "mariadb+pymysql"}
TIMEOUT = 900.0
PARTS = 5


@contextmanager
def database_of_its_own(kind: str) -> Iterator[str]:
    """Yield the URL of a new database, dropped at the end."""
    if kind == "sqlite":
        with tempfile.TemporaryDirectory() as folder:
            yield f"sqlite:///{Path(folder)}/bench.db"
        return
    name = f"bench_{uuid.uuid4().hex[:12]}"
    url = sa.make_url(DATABASES[kind]).set(drivername=DRIVERS[kind])
    server = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with server.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    try:
        yield url.set(database=name).render_as_string(hide_password=False)
    finally:
        with server.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name}")


class App:
    """Return a broker with an outbox on a database, and a broker without."""

    def __init__(self, settings: dict[str, Any], **options: Any) -> None:
        self.engine = sa.create_engine(settings["database_url"])
        create_tables(self.engine)
        with self.engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS orders (id INTEGER)")
        self.outbox = SqlOutbox(self.engine, **options)
        if settings["broker"] == "redis":
            self.broker: Any = RedisBroker(url=REDIS_URL, namespace=settings["name"])
        else:
            self.broker = RabbitmqBroker(url=RABBITMQ_URL, confirm_delivery=settings["confirms"])
        install(self.broker, outbox=self.outbox, idempotency=False)
        self.job = dramatiq.actor(
            lambda number: None, broker=self.broker, actor_name="job", queue_name=settings["name"]
        )
        self.job.send(0)

    @contextmanager
    def transaction(self, *, within: bool) -> Iterator[Session]:
        with Session(self.engine) as session, session.begin():
            session.execute(sa.text("INSERT INTO orders VALUES (1)"))
            if within:
                with self.outbox.within(session):
                    yield session
            else:
                yield session


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def relay(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the rates of single sends and of the relay, in messages per second."""
    app = App(settings, wait=0, relay=False)
    rows = settings["rows"]
    #: In turns: the machine has the same load for both.
    part = max(1, rows // PARTS)

    def send() -> None:
        for number in range(part):
            app.job.send(number)

    def insert() -> None:
        with app.transaction(within=True):
            for number in range(part):
                app.job.send(number)

    relay = Relay(app.outbox.database, app.outbox.publication, "")

    def relay_all() -> None:
        while relay.relay(ahead=True)[0]:
            pass

    sent = inserted = relayed = 0.0
    for _ in range(rows // part):
        sent += timed(send)
        inserted += timed(insert)
        relayed += timed(relay_all)
    return {"send": rows / sent, "insert": rows / inserted, "relay": rows / relayed, "ratio": sent / relayed}


def transactions(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the milliseconds of a transaction with one INSERT: alone, before a plain send, and with a send inside."""
    app = App(settings, relay=False)

    def alone() -> None:
        with app.transaction(within=False):
            pass

    def plain() -> None:
        with app.transaction(within=False):
            pass
        app.job.send(1)

    def within() -> None:
        with app.transaction(within=True):
            app.job.send(1)

    kinds = {"alone": alone, "plain": plain, "within": within}
    spent = dict.fromkeys(kinds, 0.0)
    for call in kinds.values():
        call()
    for _ in range(settings["transactions"]):
        for kind, call in kinds.items():
            spent[kind] += timed(call)
    return {kind: seconds / settings["transactions"] * 1_000 for kind, seconds in spent.items()}


TASKS = {"relay": relay, "transactions": transactions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--transactions", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--brokers", nargs="+", default=["redis", "rabbitmq", "rabbitmq with confirms"])
    parser.add_argument("--databases", nargs="+", default=["postgresql", "mariadb", "sqlite"])
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        logging.basicConfig(level=logging.CRITICAL)
        settings = json.loads(asked.measure)
        print(json.dumps(TASKS[settings["task"]](settings)), flush=True)
        os._exit(0)
    samples = rounds.collect(measurements(asked))
    if asked.json:
        asked.json.write_text(json.dumps({"machine": rounds.machine(), "measurements": samples}, indent=1))
    print(table_of_relays(samples))
    print()
    print(table_of_transactions(samples))


def measurements(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for number in range(asked.rounds):
        for broker in asked.brokers:
            for database in asked.databases:
                for task in TASKS:
                    kind = broker.split()[0]
                    with queue_of_its_own(kind) as name, database_of_its_own(database) as url:
                        settings = {
                            "task": task,
                            "broker": kind,
                            "confirms": "confirms" in broker,
                            "database_url": url,
                            "name": name,
                            "rows": asked.rows,
                            "transactions": asked.transactions,
                        }
                        found = rounds.measure("benchmarks.outbox", settings, env={}, timeout=TIMEOUT)
                    print(f"{number} {broker}, {database}: {task} {found}", file=sys.stderr)
                    yield {"round": number, "task": task, "broker": broker, "database": database, **found}


def _cells(samples: list[dict[str, Any]], task: str) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for sample in samples:
        if sample["task"] == task:
            found.setdefault((sample["broker"], sample["database"]), []).append(sample)
    for (broker, database), some in found.items():
        yield broker, database, some


def table_of_relays(samples: list[dict[str, Any]]) -> str:
    lines = ["| broker | database | send, per second | relay, per second | relay ÷ send |", "|---|---|---|---|---|"]
    for broker, database, some in _cells(samples, "relay"):
        send, relayed, ratio = (rounds.Spread(one[key] for one in some) for key in ("send", "relay", "ratio"))
        lines.append(f"| {broker} | {database} | {send.median:,.0f} | {relayed.median:,.0f} | {ratio:.2f} |")
    return "\n".join(lines)


def table_of_transactions(samples: list[dict[str, Any]]) -> str:
    lines = [
        "| broker | database | transaction, ms | and a plain send | with a send in it | in it ÷ plain |",
        "|---|---|---|---|---|---|",
    ]
    for broker, database, some in _cells(samples, "transactions"):
        alone, plain, within = (rounds.Spread(one[key] for one in some) for key in ("alone", "plain", "within"))
        ratio = rounds.Spread(one["within"] / one["plain"] for one in some)
        lines.append(
            f"| {broker} | {database} | {alone.median:.2f} | {plain.median:.2f} | {within.median:.2f} | {ratio:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
