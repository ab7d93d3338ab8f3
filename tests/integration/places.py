"""One application on one real server: its broker with dramatiq_policies, its worker, and what lies where on the server.

Queues are read with separate clients of the tests, never through the code under test.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import dramatiq
import pika
import pytest
import redis
from dramatiq import Message, Worker
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker

from dramatiq_policies import ErrorClassifier, install

PATIENCE = 30.0


def until(condition: Callable[[], Any], timeout: float = PATIENCE, describe: Callable[[], Any] | None = None) -> Any:
    """Wait until the condition holds, and return what it returned."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout} s: {describe() if describe else condition}")
        time.sleep(0.01)
    return found


class App:
    """A broker with dramatiq_policies, and what was published of its deliveries."""

    def __init__(self, place: Place, broker: Any, idempotency: Any = None, **classifier: Any) -> None:
        self.place = place
        self.broker = broker
        self.events: list[Any] = []
        classes = ErrorClassifier(on_outcome=self.events.append, **classifier)
        install(broker, error_classifier=classes, idempotency=idempotency)
        self.actor: Any = functools.partial(dramatiq.actor, broker=broker, queue_name=place.queue)
        self.worker: Worker | None = None

    @property
    def outcomes(self) -> list[str]:
        return [event.outcome.value for event in self.events]

    @contextlib.contextmanager
    def working(self, threads: int = 4) -> Iterator[Worker]:
        self.worker = worker = Worker(self.broker, worker_timeout=30, worker_threads=threads)
        worker.start()
        try:
            yield worker
        finally:
            worker.stop(10_000)

    def in_hand(self) -> int:
        """How many messages its worker has taken and not done with, delayed ones among them."""
        assert self.worker is not None
        queues = [self.worker.work_queue, *(one.delay_queue for one in self.worker.consumers.values())]
        return sum(queue.unfinished_tasks for queue in queues)

    def work_until(self, *outcomes: str, threads: int = 4) -> None:
        """Work until exactly these outcomes were published, in any order, and no message is left in a work queue."""
        with self.working(threads):
            self.wait_for(*outcomes)
        assert sorted(self.outcomes) == sorted(outcomes)

    def wait_for(self, *outcomes: str) -> None:
        until(lambda: len(self.events) >= len(outcomes), describe=lambda: self.events)


class Place:
    """A queue of our own on a server."""

    kind: str

    def __init__(self, url: str, queue: str) -> None:
        self.url = url
        self.queue = queue
        self._brokers: list[Any] = []

    def app(self, url: str | None = None, broker: Any = None, **classifier: Any) -> App:
        return App(self, self.broker(url) if broker is None else broker, **classifier)

    def broker(self, url: str | None = None) -> Any:
        """Dramatiq's own, as its users make it."""
        broker = self._make(url or self.url)
        self._brokers.append(broker)
        return broker

    def close(self) -> None:
        for broker in self._brokers:
            broker.close()

    def _make(self, url: str) -> Any:
        raise NotImplementedError

    def ready(self) -> int:
        """How many messages wait in the work queue."""
        raise NotImplementedError

    def left(self, queue: str | None = None) -> list[Message[Any]]:
        """Return the messages of the work queue and its delay queue, while no worker runs."""
        raise NotImplementedError

    def dead(self, queue: str | None = None) -> list[Message[Any]]:
        """Dramatiq's dead letters, decoded by Dramatiq."""
        return [Message.decode(body) for body in self.dead_bodies(queue)]

    def dead_bodies(self, queue: str | None = None) -> list[bytes]:
        raise NotImplementedError

    def push(self, *bodies: bytes) -> None:
        """Put bodies into the work queue as they are."""
        raise NotImplementedError


class RedisPlace(Place):
    kind = "redis"

    def __init__(self, url: str, queue: str, namespace: str, client: redis.Redis) -> None:
        super().__init__(url, queue)
        self.namespace = namespace
        self.client = client

    def _make(self, url: str) -> RedisBroker:
        return RedisBroker(url=url, namespace=self.namespace)

    def key(self, name: str) -> str:
        return f"{self.namespace}:{name}"

    def ready(self) -> int:
        return self.client.llen(self.key(self.queue))

    def left(self, queue: str | None = None) -> list[Message[Any]]:
        found = []
        for name in (queue or self.queue, f"{queue or self.queue}.DQ"):
            ids = self.client.lrange(self.key(name), 0, -1)
            bodies = self.client.hgetall(self.key(f"{name}.msgs"))
            held = list(self.client.scan_iter(match=self.key(f"__acks__.*.{name}"), count=5_000))
            unacked = [i for key in held for i in self.client.smembers(key)]
            assert sorted(ids + unacked) == sorted(bodies), f"{name}: ready {ids}, unacked {unacked}, bodies {bodies}"
            found += [Message.decode(body) for body in bodies.values()]
        return found

    def unacked(self) -> int:
        return sum(self.client.scard(key) for key in self.client.scan_iter(match=self.key("__acks__.*"), count=5_000))

    def dead_bodies(self, queue: str | None = None) -> list[bytes]:
        letters = self.key(f"{queue or self.queue}.XQ")
        # In one transaction: a worker may be writing.
        with self.client.pipeline() as both:
            ids, bodies = both.zrange(letters, 0, -1).hgetall(f"{letters}.msgs").execute()
        assert sorted(ids) == sorted(bodies)
        return [bodies[i] for i in ids]

    def push(self, *bodies: bytes) -> None:
        for body in bodies:
            self.push_as(str(uuid.uuid4()), body)

    def push_as(self, redis_id: str, body: bytes) -> None:
        self.client.hset(self.key(f"{self.queue}.msgs"), redis_id, body)
        self.client.rpush(self.key(self.queue), redis_id)


class RabbitmqPlace(Place):
    kind = "rabbitmq"

    def __init__(self, url: str, queue: str) -> None:
        super().__init__(url, queue)
        self.connection = pika.BlockingConnection(pika.URLParameters(url))
        self.channel = self.connection.channel()
        self._dead: dict[str, list[bytes]] = {}

    def _make(self, url: str) -> RabbitmqBroker:
        return RabbitmqBroker(url=url)

    def close(self) -> None:
        super().close()
        self.connection.close()

    def drain(self, name: str) -> list[bytes]:
        bodies = []
        while True:
            method, _, body = self.channel.basic_get(name, auto_ack=True)
            if method is None:
                return bodies
            bodies.append(body)

    def ready(self) -> int:
        return self.channel.queue_declare(self.queue, passive=True).method.message_count

    def left(self, queue: str | None = None) -> list[Message[Any]]:
        queue = queue or self.queue
        return [Message.decode(body) for name in (queue, f"{queue}.DQ") for body in self.drain(name)]

    def dead_bodies(self, queue: str | None = None) -> list[bytes]:
        found = self._dead.setdefault(queue or self.queue, [])
        found += self.drain(f"{queue or self.queue}.XQ")
        return found

    def push(self, *bodies: bytes) -> None:
        for body in bodies:
            self.channel.basic_publish("", self.queue, body)


def lose_an_answer(monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    """Have the next answer that pika gets from its server struck by an error from outside, in the middle of reading it."""
    read = pika.channel.Channel._on_synchronous_complete

    def struck(channel: Any, answer: Any) -> None:
        monkeypatch.setattr(pika.channel.Channel, "_on_synchronous_complete", read)
        raise error

    monkeypatch.setattr(pika.channel.Channel, "_on_synchronous_complete", struck)


def soon(call: Callable[[], Any]) -> Any:
    """Its result or error, on a thread of its own: a call that waits for ever must not stop the tests."""
    found: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            found.set_result(call())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return found.result(PATIENCE)


class Gate:
    """A job that waits until the test lets it go on."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        assert self.open.wait(PATIENCE)
