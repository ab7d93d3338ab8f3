"""A transactional job beside the same job with a key and a commit of its own.

    python -m benchmarks.transactional [--jobs 1000] [--rounds 5] [--brokers redis rabbitmq] [--databases postgresql mariadb]

Each job inserts a row. Each measurement has its own process with eight threads, its own database and queue. Needs
Redis, RabbitMQ, PostgreSQL and MariaDB (REDIS_URL, RABBITMQ_URL, POSTGRESQL_URL, MARIADB_URL; by default the local servers).
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dramatiq
import sqlalchemy as sa
from dramatiq import Worker
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from sqlalchemy.orm import Session

from dramatiq_policies import Idempotency, current_job, install
from dramatiq_policies.sql import SqlOutbox, SqlStore, create_tables
from dramatiq_policies.stores.redis import RedisStore

from . import rounds
from .measurement import queue_of_its_own
from .outbox import database_of_its_own
from .variants import RABBITMQ_URL, REDIS_URL

__all__ = ["main"]

#: No key; a key on Redis; a key in the database; effect and key in one transaction.
VARIANTS = ("no key", "key on Redis", "key in SQL", "transactional", "transactional, one send")
THREADS = 8
TIMEOUT = 300.0


def measure(settings: dict[str, Any]) -> dict[str, float]:
    """Jobs per second, and CPU of the worker per job."""
    engine = sa.create_engine(settings["database_url"], pool_size=THREADS)
    create_tables(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE payments (number INTEGER)")
    variant, name, jobs = settings["variant"], settings["name"], settings["jobs"]
    if settings["broker"] == "redis":
        broker: Any = RedisBroker(url=REDIS_URL, namespace=name)
    else:
        broker = RabbitmqBroker(url=RABBITMQ_URL)
    is_transactional = variant.startswith("transactional")
    store: Any = SqlStore(engine, namespace=name[-60:])
    if variant == "key on Redis":
        store = RedisStore.from_url(REDIS_URL, namespace=f"{name}:keys")
    install(broker, outbox=SqlOutbox(engine, namespace=name[-60:]), idempotency=Idempotency(store))
    row = sa.text("INSERT INTO payments VALUES (:number)")
    marks: list[tuple[float, float]] = []
    over, counter = threading.Event(), itertools.count(1)

    def ended() -> None:
        if next(counter) in (1, jobs):
            marks.append((time.perf_counter(), time.process_time()))
            if len(marks) == 2:
                over.set()

    def in_transaction(number: int) -> None:
        current_job().session.execute(row, {"number": number})
        if variant.endswith("send"):
            note.send(number)
        ended()

    def with_own_commit(number: int) -> None:
        with Session(engine) as session, session.begin():
            session.execute(row, {"number": number})
        ended()

    options: dict[str, Any] = {} if variant == "no key" else {"idempotency_key": "{number}"}
    options["transactional"] = is_transactional
    fn = in_transaction if is_transactional else with_own_commit
    job = dramatiq.actor(fn, broker=broker, actor_name="job", queue_name=name, **options)
    note = dramatiq.actor(lambda number: None, broker=broker, actor_name="note", queue_name=f"{name}-notes")
    for number in range(jobs):
        job.send(number)
    Worker(broker, queues={name}, worker_threads=THREADS).start()
    if not over.wait(TIMEOUT - 30):
        sys.exit("the jobs did not end")
    (first, first_cpu), (last, last_cpu) = marks
    return {"rate": jobs / (last - first), "cpu_us": (last_cpu - first_cpu) / jobs * 1e6}


def measurements(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for number, order in rounds.interleave(VARIANTS, asked.rounds):
        for broker, database in itertools.product(asked.brokers, asked.databases):
            for variant in order:
                with queue_of_its_own(broker) as name, database_of_its_own(database) as url:
                    settings = {
                        "variant": variant,
                        "broker": broker,
                        "database_url": url,
                        "name": name,
                        "jobs": asked.jobs,
                    }
                    found = rounds.measure("benchmarks.transactional", settings, env={}, timeout=TIMEOUT)
                print(f"{number} {broker}, {database}: {variant} {found}", file=sys.stderr)
                yield {"round": number, "variant": variant, "broker": broker, "database": database, **found}


def table(samples: list[dict[str, Any]]) -> str:
    """Jobs per second of each variant, and the ratio to a key in the same database."""
    lines = [
        "| broker | database | variant | jobs per second | CPU, µs per job | ÷ key in SQL |",
        "|---|---|---|---|---|---|",
    ]
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for sample in samples:
        cells.setdefault((sample["broker"], sample["database"]), []).append(sample)
    for (broker, database), some in cells.items():
        for variant in VARIANTS:
            own = [one for one in some if one["variant"] == variant]
            if not own:
                continue
            rate, cpu = (rounds.Spread(one[key] for one in own) for key in ("rate", "cpu_us"))
            ratio = rounds.format_ratio(
                rounds.ratios(some, variant, "rate", reference="key in SQL"), variant, reference="key in SQL"
            )
            lines.append(f"| {broker} | {database} | {variant} | {rate:,.0f} | {cpu.median:,.0f} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--brokers", nargs="+", default=["redis", "rabbitmq"])
    parser.add_argument("--databases", nargs="+", default=["postgresql", "mariadb"])
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        logging.basicConfig(level=logging.CRITICAL)
        print(json.dumps(measure(json.loads(asked.measure))), flush=True)
        os._exit(0)
    samples = rounds.collect(measurements(asked))
    if asked.json:
        asked.json.write_text(json.dumps({"machine": rounds.machine(), "measurements": samples}, indent=1))
    print(table(samples))


if __name__ == "__main__":
    main()
