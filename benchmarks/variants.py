"""The compared variants: the same job on brokers with different middleware."""

from __future__ import annotations

import atexit
import itertools
import os
import socket
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dramatiq

__all__ = ["FAILURES", "VARIANTS", "Permanent", "Transient", "Variant", "Workload", "deaf_server"]

REDIS_URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")
RABBITMQ_URL = os.environ.get("RABBITMQ_URL", "amqp://guest:guest@127.0.0.1:5672")

#: Shares of jobs with one failure and a retry, and of jobs with a permanent failure.
FAILURES: dict[str, tuple[float, float]] = {"none": (0.0, 0.0), "mixed": (0.10, 0.05)}

#: The maximum of runs of a failing job, and the wait between two runs, equal for all variants with retries.
ATTEMPTS = 6
WAIT_MS = 1


class Transient(Exception):
    """Raised by the first attempt."""


class Permanent(Exception):
    """Raised by every attempt; no variant retries the job."""


@dataclass(frozen=True)
class Variant:
    """A name, the builder of the broker, and the actor's options for the two errors.

    Attributes:
      broker: Called with the broker's class or factory, which takes ``middleware``.
      options: The actor's options.
      retries: Whether the variant retries jobs. Measurements with failing jobs leave the others out.
    """

    broker: Callable[[Callable[..., dramatiq.Broker]], dramatiq.Broker]
    options: Callable[[], dict[str, Any]]
    retries: bool = True


def _bare(make: Callable[..., dramatiq.Broker]) -> dramatiq.Broker:
    return make(middleware=[])


def _stock(make: Callable[..., dramatiq.Broker]) -> dramatiq.Broker:
    return make()


def _stock_options() -> dict[str, Any]:
    return {"max_retries": ATTEMPTS - 1, "min_backoff": WAIT_MS, "max_backoff": WAIT_MS, "throws": Permanent}


def _bundle(make: Callable[..., dramatiq.Broker]) -> dramatiq.Broker:
    from dramatiq_policies import install

    return install(make(), idempotency=False)


def _store(broker: dramatiq.Broker) -> Any:
    from dramatiq_policies.stores.redis import RedisStore

    # Beside the queue's keys, deleted after the measurement; on RabbitMQ the keys expire after ten minutes.
    return RedisStore.from_url(
        REDIS_URL, namespace=getattr(broker, "namespace", f"bench-{uuid.uuid4().hex[:12]}") + ":idem"
    )


def _idempotent(make: Callable[..., dramatiq.Broker]) -> dramatiq.Broker:
    from dramatiq_policies import Idempotency, install

    broker = make()
    lease = int(os.environ.get("BENCH_LEASE", "60000"))
    return install(broker, idempotency=Idempotency(_store(broker), ttl=600_000, lease=lease))


def _installed(make: Callable[..., dramatiq.Broker]) -> dramatiq.Broker:
    return _idempotent(make)


def _idempotent_options() -> dict[str, Any]:
    return {**_bundle_options(), "idempotency_key": "a-job-with-a-key-of-thirty:{number}"}


class Naive(dramatiq.Middleware):
    """The usual recipe: SET NX before the job, SET done after the job. A worker's death loses the job."""

    def __init__(self, url: str) -> None:
        import redis

        self.client = redis.Redis.from_url(url)

    def before_process_message(self, broker: dramatiq.Broker, message: dramatiq.MessageProxy) -> None:
        if not self.client.set(f"bench-naive:{message.message_id}", "running", nx=True, px=600_000):
            raise dramatiq.middleware.SkipMessage

    def after_process_message(self, broker: Any, message: Any, *, result: Any = None, exception: Any = None) -> None:
        self.client.set(f"bench-naive:{message.message_id}", "done", px=600_000)


def _naive(make: Callable[..., dramatiq.Broker]) -> dramatiq.Broker:
    broker = _bundle(make)
    broker.add_middleware(Naive(REDIS_URL))
    return broker


def _full(make: Callable[..., dramatiq.Broker]) -> dramatiq.Broker:
    import sentry_sdk

    from dramatiq_policies import Metrics, QueueMonitor, SentryReporter, install

    host, port = deaf_server()
    os.environ.update(STATSD_HOST=host, STATSD_PORT=str(port))
    # Events are made, and go nowhere.
    sentry_sdk.init("http://key@127.0.0.1:1/1", transport=lambda envelope: None, auto_enabling_integrations=False)
    return install(make(), idempotency=False, metrics=Metrics(), sentry=SentryReporter(), queue_monitor=QueueMonitor())


def deaf_server() -> tuple[str, int]:
    """Where something takes datagrams, and reads none, until this process ends: on this machine, at a port that was free."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    listening.bind(("127.0.0.1", 0))
    atexit.register(listening.close)
    address: tuple[str, int] = listening.getsockname()
    return address


def _bundle_options() -> dict[str, Any]:
    from dramatiq_policies import RetryPolicy, constant

    return {
        "retry_on": {Transient: RetryPolicy(attempts=ATTEMPTS, wait=constant(WAIT_MS))},
        "discard_on": Permanent,
    }


VARIANTS: dict[str, Variant] = {
    "bare": Variant(_bare, dict, retries=False),  # no middleware at all
    "stock": Variant(_stock, _stock_options),  # Dramatiq's default middleware
    "control": Variant(_stock, _stock_options),  # stock once more: how far from 1 is noise
    "bundle": Variant(_bundle, _bundle_options),  # ErrorClassifier, Timeout and DiscardLogger
    "installed": Variant(_installed, _bundle_options),  # and Idempotency, of which the actor asks nothing
    "naive": Variant(_naive, _bundle_options),  # the bundle and SET NX, SET done
    "idempotent": Variant(_idempotent, _idempotent_options),  # the bundle and a key, with a store on Redis
    "full": Variant(_full, _bundle_options),  # and Metrics, SentryReporter and QueueMonitor
}


class Workload:
    """Declare an empty actor for ``jobs`` jobs. The same jobs fail in each run, by ``failures``.

    Parameters:
      jobs: The number of jobs.
      failures: A name in FAILURES.
      on_first: Called once, when the first job starts.
      on_last: Called once, after the final end of the last job, on its thread.
    """

    def __init__(
        self,
        jobs: int,
        failures: str,
        *,
        on_first: Callable[[], object] = lambda: None,
        on_last: Callable[[], object] = lambda: None,
    ) -> None:
        self.jobs = jobs
        self.transient, self.permanent = FAILURES[failures]
        self.on_first = on_first
        self.on_last = on_last
        self._failed_once: set[int] = set()
        # next() of a count is atomic, and cheaper than a lock.
        self._started = itertools.count(1)
        self._ended = itertools.count(1)
        self.runs = 0

    def declare(self, variant: Variant, broker: dramatiq.Broker, queue_name: str) -> Callable[..., object]:
        """Declare the job as an actor; returns what enqueues the job of a number, with a payload or without."""
        declare = dramatiq.actor(broker=broker, actor_name="job", queue_name=queue_name, **variant.options())
        return declare(self.run).send

    def run(self, number: int, payload: str = "") -> None:
        """The job."""
        started = next(self._started)
        if started == 1:
            self.on_first()
        if self.transient or self.permanent:
            draw = (number * 2_654_435_761 % 2**32) / 2**32
            if draw < self.transient and number not in self._failed_once:
                self._failed_once.add(number)
                raise Transient
            self._end()
            if self.transient <= draw < self.transient + self.permanent:
                raise Permanent
        else:
            self._end()

    def _end(self) -> None:
        if next(self._ended) == self.jobs:
            self.runs = next(self._started) - 1
            self.on_last()

    @property
    def expected_runs(self) -> int:
        """How many runs it takes if each transient failure is retried once, and no other."""
        return self.jobs + len(self._failed_once)
