"""Jobs against a service of five requests a second: the rules of docs/rate-limited-services.md, side by side.

The service runs in this process and answers a sixth request within a second by 429 and ``Retry-After: 1``. Needs Redis:

    REDIS_URL=redis://localhost:6379/0 python -m benchmarks.rate_limited_service --messages 100 200
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import threading
import time
import urllib.error
import urllib.request
import uuid
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import dramatiq
import redis
from dramatiq.brokers.redis import RedisBroker
from dramatiq.rate_limits import WindowRateLimiter
from dramatiq.rate_limits.backends import RedisBackend

from dramatiq_policies import (
    ErrorClassifier,
    Outcome,
    OutcomeEvent,
    RetryPolicy,
    Snooze,
    exponential,
    install,
    retry_after,
)

REDIS_URL = os.environ.get("REDIS_URL", "redis://localhost:6379/0")
PER_SECOND = 5


class Service(BaseHTTPRequestHandler):
    """Five requests in each second of the clock."""

    protocol_version = "HTTP/1.1"
    lock = threading.Lock()
    calls: ClassVar[collections.Counter[int]] = collections.Counter()

    def do_GET(self) -> None:
        with self.lock:
            second = int(time.time())
            self.calls[second] += 1
            accepted = self.calls[second] <= PER_SECOND
        self.send_response(200 if accepted else 429)
        if not accepted:
            self.send_header("Retry-After", "1")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


_asked = retry_after(jitter=0)
_growing = exponential(initial=timedelta(seconds=1), maximum=timedelta(minutes=1), jitter=1)


def at_least_as_asked(attempt: int, error: BaseException) -> float:
    return max(_asked(attempt, error), _growing(attempt, error))


RULES: dict[str, tuple[RetryPolicy, bool]] = {
    "3 attempts, Retry-After alone": (RetryPolicy(attempts=3, wait=retry_after(jitter=0)), False),
    "10 attempts, Retry-After alone": (RetryPolicy(attempts=10, wait=retry_after(jitter=0)), False),
    "10 attempts, Retry-After with jitter 0.15": (RetryPolicy(attempts=10, wait=retry_after()), False),
    "an hour, Retry-After with jitter 0.15": (
        RetryPolicy(attempts=100, max_elapsed=timedelta(hours=1), wait=retry_after()),
        False,
    ),
    "10 attempts, growing": (RetryPolicy(attempts=10, wait=at_least_as_asked), False),
    "10 attempts, growing, and a limiter of our own": (RetryPolicy(attempts=10, wait=at_least_as_asked), True),
}


def measure(policy: RetryPolicy, limited: bool, messages: int, port: int, threads: int) -> str:
    name = f"rate-limited-{uuid.uuid4().hex[:8]}"
    broker = RedisBroker(url=REDIS_URL, namespace=name)
    limiter = WindowRateLimiter(RedisBackend(url=REDIS_URL), f"{name}-limiter", limit=PER_SECOND, window=1)
    outcomes: collections.Counter[str] = collections.Counter()
    over = threading.Event()
    Service.calls.clear()

    def count(event: OutcomeEvent) -> None:
        outcomes[event.outcome.value] += 1
        if outcomes[Outcome.SUCCEEDED.value] + outcomes[Outcome.DEAD.value] == messages:
            over.set()

    install(broker, discard_logger=False, error_classifier=ErrorClassifier(on_outcome=count))

    @dramatiq.actor(broker=broker, retry_on={urllib.error.HTTPError: policy})
    def call() -> None:
        if limited:
            with limiter.acquire(raise_on_failure=False) as allowed:
                if not allowed:
                    raise Snooze(random.randint(500, 5_000), "our own limit")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}"):
            pass

    for _ in range(messages):
        call.send()
    worker = dramatiq.Worker(broker, worker_threads=threads, worker_timeout=50)
    begun = time.monotonic()
    worker.start()
    over.wait(600)
    took = time.monotonic() - begun
    worker.stop()
    client = redis.Redis.from_url(REDIS_URL)
    for key in client.scan_iter(f"{name}*"):
        client.delete(key)
    calls = sum(Service.calls.values())
    return f"{outcomes['succeeded']:4d} {outcomes['dead']:4d} dead  {calls:5d} calls  {took:5.0f} s  {dict(outcomes)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, nargs="+", default=[100, 200])
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for messages in options.messages:
        for name, (policy, limited) in RULES.items():
            if options.only in name:
                result = measure(policy, limited, messages, server.server_address[1], options.threads)
                print(f"{messages:4d} messages  {name:48} {result}", flush=True)


if __name__ == "__main__":
    main()
