"""One measurement in a new process: enqueue empty jobs, then have a worker drain the queue.

The clock of the worker process runs from the start of the first job to the final end of the last job.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import os
import resource
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import dramatiq

from . import rounds
from .peers import PEERS
from .variants import RABBITMQ_URL, REDIS_URL, VARIANTS, Workload

__all__ = ["SETTINGS", "measure", "queue_of_its_own", "server_versions"]

TIMEOUT = 600.0  # seconds for one measurement

#: The settings of a measurement, with their defaults.
SETTINGS: dict[str, Any] = {
    "task": "drain",  # or "processes", "fill", "keys"
    "broker": "redis",
    "variant": "stock",
    "failures": "none",
    "jobs": 2_000,
    "threads": 8,
    "processes": 1,
    "prefetch": "default",  # dramatiq_queue_prefetch
    "payload": 0,  # bytes of an argument
    "log": "critical",
    "lease": 60_000,  # ms, of a claim on an idempotency key
    "hiredis": True,
    "confirms": False,  # of RabbitMQ, for what is sent
    "by_thousands": False,  # whether the jobs are enqueued as "fill" does
    "memory_every": 0,  # jobs between two readings of the worker's memory
    "backlog": False,  # whether other jobs stand in the queue
    "standing": 0,  # the number of jobs or keys already stored for "fill" or "keys"
}


def measure(**settings: Any) -> dict[str, Any] | None:
    """Measure in a new process; under a name of its own, deleted afterwards, unless ``name`` is given.

    Prints the rate on stderr. A failed measurement is printed, counted in ``rounds.failures``, and returns None.
    """
    settings = {**SETTINGS, **settings}
    environment = {
        "dramatiq_queue_prefetch": None if settings["prefetch"] == "default" else str(settings["prefetch"]),
        "BENCH_LEASE": str(settings["lease"]),
    }
    module = "benchmarks.peers" if settings["variant"] in PEERS else "benchmarks.measurement"
    given = "name" in settings
    try:
        with nullcontext(settings["name"]) if given else queue_of_its_own(settings["broker"]) as name:
            measured = rounds.measure(module, {**settings, "name": name}, env=environment, timeout=TIMEOUT)
    except rounds.MeasurementFailed as error:
        rounds.failures.append(str(error))
        print(f"\n{error}", file=sys.stderr)
        return None
    if "rate" in measured:
        print(f" {settings['variant']} {measured['rate']:,.0f}/s", end="", file=sys.stderr, flush=True)
    return dict(measured)


# ---------------------------------------------------------------------- in that process


def drain(settings: dict[str, Any]) -> dict[str, Any]:
    """Enqueue and drain."""
    marks: list[tuple[float, float]] = []
    over = threading.Event()

    def mark() -> None:
        marks.append((time.perf_counter(), time.process_time()))

    def on_last() -> None:
        mark()
        over.set()

    jobs = settings["jobs"]
    workload = Workload(jobs, settings["failures"], on_first=mark, on_last=on_last)
    memory: list[tuple[int, float]] = []
    if settings["memory_every"]:
        workload = _Watched(workload, settings["memory_every"], memory)
    broker, send = _declare(settings, workload)
    enqueue_from = time.perf_counter()
    if settings["by_thousands"]:
        fill(settings)
    else:
        for number in range(jobs):
            send(number)
    enqueued = time.perf_counter()

    _work(broker, settings)
    if not over.wait(TIMEOUT - 30):
        sys.exit("the jobs did not end")
    # Other queued jobs may have begun.
    if not settings["backlog"] and workload.runs != workload.expected_runs:
        sys.exit(f"expected {workload.expected_runs} runs, got {workload.runs}")
    (first, first_cpu), (last, last_cpu) = marks
    measured = {
        "rate": jobs / (last - first),
        "cpu_us": (last_cpu - first_cpu) / jobs * 1e6,
        "enqueue_rate": jobs / (enqueued - enqueue_from),
    }
    return {**measured, "memory": memory} if memory else measured


class _Watched(Workload):
    """Reads the resident memory of the process, in MiB, every so many jobs."""

    def __init__(self, other: Workload, every: int, readings: list[tuple[int, float]]) -> None:
        vars(self).update(vars(other))
        self._numbers = itertools.count()
        self._every = every
        self._readings = readings

    def run(self, number: int, payload: str = "") -> None:
        """The job."""
        if (count := next(self._numbers)) % self._every == 0:
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
            self._readings.append((count, round(pages * resource.getpagesize() / 2**20, 2)))
        super().run(number, payload)


def drain_in_processes(settings: dict[str, Any]) -> dict[str, Any]:
    """Enqueue, and let several processes drain."""
    context = multiprocessing.get_context("fork")
    jobs, processes = settings["jobs"], settings["processes"]
    ended = context.RawArray("q", processes)
    first = context.RawArray("d", processes)
    last = context.RawArray("d", processes)
    may_begin = context.Event()

    def work(index: int) -> None:
        lock = threading.Lock()

        class Counted(Workload):
            def run(self, number: int, payload: str = "") -> None:
                with lock:
                    last[index] = time.perf_counter()
                    first[index] = first[index] or last[index]
                    ended[index] += 1

        broker, _ = _declare(settings, Counted(jobs, "none"))
        may_begin.wait()
        _work(broker, settings)
        threading.Event().wait()

    workers = [context.Process(target=work, args=(index,), daemon=True) for index in range(processes)]
    for worker in workers:  # before this process has a connection
        worker.start()
    _, send = _declare(settings, Workload(jobs, "none"))
    for number in range(jobs):
        send(number)
    may_begin.set()
    give_up = time.monotonic() + TIMEOUT - 30
    while sum(ended) < jobs and time.monotonic() < give_up:
        time.sleep(0.01)
    for worker in workers:
        worker.kill()
    if sum(ended) != jobs:
        sys.exit(f"expected {jobs} runs, got {sum(ended)}")
    return {"rate": jobs / (max(last) - min(moment for moment in first if moment))}


def fill(settings: dict[str, Any]) -> dict[str, Any]:
    """Fill the queue with waiting messages, by thousands."""
    broker: Any
    broker, send = _declare(settings, Workload(settings["jobs"], "none"))
    send(0)  # declares the queue
    queue_name, actor = settings["name"], broker.get_actor("job")
    messages = (actor.message(number) for number in range(settings["standing"] + 1, settings["jobs"]))
    if settings["broker"] == "redis":
        for batch in iter(lambda: list(itertools.islice(messages, 1_000)), []):
            bodies = {
                message.message_id: message.copy(options={"redis_message_id": message.message_id}).encode()
                for message in batch
            }
            pipeline = broker.client.pipeline(transaction=False)
            pipeline.hset(f"{queue_name}:{queue_name}.msgs", mapping=bodies)
            pipeline.rpush(f"{queue_name}:{queue_name}", *bodies)
            pipeline.execute()
    else:
        import pika

        persistent = pika.BasicProperties(delivery_mode=2)
        for message in messages:
            broker.channel.basic_publish(
                exchange="", routing_key=queue_name, body=message.encode(), properties=persistent
            )
        broker.close()  # what is still on its way arrives
    return {}


def remember(settings: dict[str, Any]) -> dict[str, Any]:
    """Copy the completed key of a job many times into the store; return the bytes of each copy."""
    import redis

    if not settings["standing"]:
        drain({**settings, "variant": "idempotent", "jobs": 10})
        time.sleep(0.5)  # what the last job completes
    client = redis.Redis.from_url(REDIS_URL)
    key = next(client.scan_iter(match=f"{settings['name']}:idem:*", count=1_000))
    value = client.get(key)
    digest = len(key.rpartition(b":")[2])
    # As long a name as with the default namespace, "idem". Deleted by the name of all this, which is as long as a digest.
    prefix = settings["name"].removeprefix("bench-")
    before = client.info("memory")["used_memory"]
    numbers = iter(range(settings["standing"], settings["jobs"]))
    for batch in iter(lambda: list(itertools.islice(numbers, 1_000)), []):
        pipeline = client.pipeline(transaction=False)
        for number in batch:
            pipeline.set(f"{prefix}:{number:x}".ljust(len("idem:") + digest, "-"), value, px=3_600_000)
        pipeline.execute()
    return {"used_bytes": client.info("memory")["used_memory"] - before}


def _declare(settings: dict[str, Any], workload: Workload) -> tuple[dramatiq.Broker, Callable[[int], object]]:
    variant = VARIANTS[settings["variant"]]
    broker = variant.broker(_broker_factory(settings))
    send = workload.declare(variant, broker, settings["name"])
    payload = "x" * settings["payload"]
    return broker, (lambda number: send(number, payload)) if payload else send


def _work(broker: dramatiq.Broker, settings: dict[str, Any]) -> None:
    broker.emit_after("process_boot")  # as the command line does
    dramatiq.Worker(broker, worker_threads=settings["threads"]).start()


def _broker_factory(settings: dict[str, Any]) -> Callable[..., dramatiq.Broker]:
    if not settings["hiredis"]:
        sys.modules["hiredis"] = None  # type: ignore[assignment] # as if it were not installed
    if settings["broker"] == "redis":
        from dramatiq.brokers.redis import RedisBroker

        untyped: Any = RedisBroker
        return lambda **options: untyped(url=REDIS_URL, namespace=settings["name"], **options)

    from dramatiq.brokers.rabbitmq import RabbitmqBroker

    return lambda **options: RabbitmqBroker(url=RABBITMQ_URL, confirm_delivery=settings["confirms"], **options)


def _set_up_logging(log: str) -> None:
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    if log == "critical":
        logging.basicConfig(level=logging.CRITICAL)
        return
    from dramatiq.cli import LOGFORMAT

    sink = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    logging.basicConfig(level=logging.INFO, format=LOGFORMAT, stream=sink)


# ---------------------------------------------------------------------- the servers


@contextmanager
def queue_of_its_own(broker: str) -> Iterator[str]:
    """Yield a unique name, and delete all data under the name at the end."""
    name = f"bench-{uuid.uuid4().hex[:12]}"
    try:
        yield name
    finally:
        if broker == "redis":
            _delete_redis(name)
        else:
            _delete_rabbitmq(name)


def _delete_redis(name: str) -> None:
    import redis

    with redis.Redis.from_url(REDIS_URL) as client:
        keys = client.scan_iter(match=f"*{name.removeprefix('bench-')}*", count=1_000)
        for batch in iter(lambda: list(itertools.islice(keys, 500)), []):
            client.unlink(*batch)
        client.srem("queues", name)  # Sidekiq's


def _delete_rabbitmq(name: str) -> None:
    import pika

    with pika.BlockingConnection(pika.URLParameters(RABBITMQ_URL)) as connection:
        channel = connection.channel()
        for queue_name in (name, f"{name}.DQ", f"{name}.XQ"):
            channel.queue_delete(queue_name)
        channel.exchange_delete(name)  # Celery's


def server_versions(brokers: list[str]) -> dict[str, str | None]:
    """Ask each server for its version. A missing server fails here first."""
    found: dict[str, str | None] = {}
    if "redis" in brokers:
        import redis

        with redis.Redis.from_url(REDIS_URL) as client:
            found["redis_server"] = client.info("server")["redis_version"]
    if "rabbitmq" in brokers:
        import pika

        with pika.BlockingConnection(pika.URLParameters(RABBITMQ_URL)) as connection:
            properties = getattr(getattr(connection, "_impl", None), "server_properties", None) or {}
            server = properties.get("version")
            found["rabbitmq_server"] = server.decode() if isinstance(server, bytes) else server
    return found


def main() -> None:
    """Run one measurement, print the result, and exit at once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", required=True)
    settings = json.loads(parser.parse_args().measure)
    _set_up_logging(settings["log"])
    tasks = {"drain": drain, "processes": drain_in_processes, "fill": fill, "keys": remember}
    print(json.dumps(tasks[settings["task"]](settings)), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
