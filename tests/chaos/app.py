"""The application of the workers: jobs that record each run in a ledger outside of the broker.

A line is written by one ``write`` to a file opened for appending, so that neither a kill nor another process tears it.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dramatiq
from dramatiq.middleware import GroupCallbacks
from dramatiq.rate_limits.backends import RedisBackend as Barriers
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from dramatiq_policies import ErrorClassifier, Idempotency, RetryPolicy, constant, current_job, install
from dramatiq_policies.delivery.broker_state import state_of
from dramatiq_policies.stores.redis import RedisStore

from .clients import redis_client

LEDGER = os.open(os.environ["CHAOS_LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
STORE = os.environ["CHAOS_STORE"]
#: Seconds that one in ten of the plain jobs takes at most.
LATE = float(os.environ.get("CHAOS_LATE") or 0)

numbers = itertools.count(1)
#: The run of each message that has begun here.
runs: dict[str, str] = {}


class Transient(Exception):
    pass


class Permanent(Exception):
    pass


def note(*words: object) -> None:
    os.write(LEDGER, (" ".join(map(str, (time.monotonic(), os.getpid(), *words))) + "\n").encode())


def tell(message_id: str, actor: str, outcome: str, reason: str | None) -> None:
    """Noted when all was written that makes a job run once, and before the ack."""
    note("outcome", runs.pop(message_id, "-"), actor, message_id, outcome, reason or "-")


def on_outcome(event: Any, message: Any = None) -> None:
    tell(event.message_id, event.actor, event.outcome.value, event.reason)


def on_success(delivery: Any) -> None:
    tell(delivery.message.message_id, delivery.message.actor_name, "succeeded", None)


def make_broker() -> Any:
    url = os.environ["CHAOS_URL"]
    if url.startswith("amqp"):
        from dramatiq.brokers.rabbitmq import RabbitmqBroker

        nodes = url.split(";")
        random.shuffle(nodes)  # the first that answers is taken
        broker: Any = RabbitmqBroker(url=nodes, confirm_delivery=True)
    else:
        from dramatiq.brokers.redis import RedisBroker

        broker = RedisBroker(client=redis_client(url), heartbeat_timeout=int(os.environ["CHAOS_HEARTBEAT_TIMEOUT"]))
    # One client: an idle connection of another would still lead to a master that has a successor.
    client = getattr(broker, "client", None) or redis_client(STORE)
    broker.add_middleware(Results(backend=RedisBackend(client=client)))
    broker.add_middleware(GroupCallbacks(Barriers(client=client)))
    # Where successes are subscribed to, completions don't ride on the claims of the next jobs: half of the workers do either.
    posts = os.getpid() % 2 == 0
    install(
        broker,
        error_classifier=ErrorClassifier(on_outcome=None if posts else on_outcome),
        idempotency=Idempotency(RedisStore.beside(redis_client(STORE)), lease=int(os.environ["CHAOS_LEASE"])),
    )
    if posts:
        state = state_of(broker)
        state.outcomes.observe(state, on_outcome, successes=False)
        state.outcomes.success_listeners = (on_success,)
    return broker


broker = make_broker()
dramatiq.set_broker(broker)


@contextmanager
def running(name: str, number: int) -> Iterator[None]:
    """One run, as the ledger has it: begun, its effect made somewhere in the middle, ended or raised."""
    job = current_job()
    run = runs[job.message_id] = f"{os.getpid()}.{next(numbers)}"
    note("begin", run, f"{name}:{number}", job.message_id, job.attempt)
    try:
        time.sleep(random.uniform(0.005, 0.08))
        yield
        note("effect", run)
        time.sleep(random.uniform(0, 0.03))
    except BaseException:
        note("raise", run)
        raise
    note("end", run)


once: Any = {"queue_name": "jobs", "idempotency_key": "{number}"}


@dramatiq.actor(**once)
def plain(number: int) -> None:
    with running("plain", number):
        if number % 10 == 9:
            time.sleep(random.uniform(0, LATE))


@dramatiq.actor(retry_on={Transient: RetryPolicy(attempts=10, wait=constant(300))}, **once)
def flaky(number: int) -> None:
    with running("flaky", number):
        if current_job().attempt == 1:
            raise Transient(number)


@dramatiq.actor(max_retries=0, **once)
def hopeless(number: int) -> None:
    with running("hopeless", number):
        raise Permanent(number)


@dramatiq.actor(queue_name="jobs")
def unguarded(number: int) -> None:
    with running("unguarded", number):
        pass


@dramatiq.actor(store_results=True, **once)
def first(number: int) -> int:
    with running("first", number):
        return number


@dramatiq.actor(**once)
def second(number: int) -> None:
    with running("second", number):
        pass


@dramatiq.actor(**once)
def member(number: int) -> None:
    with running("member", number):
        pass


@dramatiq.actor(**once)
def together(number: int) -> None:
    with running("together", number):
        pass
