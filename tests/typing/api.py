"""The public API as its users' type checkers see it: checked by mypy, never run.

An ignored error proves, by ``warn_unused_ignores``, that the error is found.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import dramatiq
from dramatiq import Actor, Message
from dramatiq.broker import Broker
from dramatiq.brokers.stub import StubBroker

from dramatiq_policies import (
    ActorOptions,
    ConfigurationError,
    CurrentJob,
    Discard,
    DiscardLogger,
    ErrorClassifier,
    Heartbeat,
    Metrics,
    Outcome,
    OutcomeEvent,
    QueueAlert,
    QueueMonitor,
    RetryPolicy,
    SentryReporter,
    Snooze,
    StuckJob,
    Threshold,
    Timeout,
    TimeoutExceeded,
    actor,
    constant,
    current_job,
    exponential,
    install,
    polynomial,
    retry_after,
    testing,
    when,
)


def use(*values: object) -> None: ...


class RateLimited(Exception):
    retry_after: float = 1.0


class OrderNotFound(Exception): ...


# The bare decorator, with and without arguments, sync and async: the actor keeps its function's types.


@actor
def add(x: int, y: int) -> int:
    return x + y


@actor
async def add_later(x: int, y: int) -> int:
    return x + y


added: int = add(1, 2)
sent: Message[int] = add.send(1, y=2)
sent_later: Message[int] = add_later.send(1, 2)
plain: Actor[[int, int], int] = add

add.send("1", 2)  # type: ignore[arg-type]
add.send(1)  # type: ignore[call-arg]


# Every option.


@actor(
    actor_name="send",
    queue_name="mail",
    priority=10,
    broker=StubBroker(),
    max_retries=3,
    min_backoff=1_000,
    max_backoff=60_000,
    retry_when=lambda retries, error: retries < 3,
    throws=(ValueError, KeyError),
    on_retry_exhausted="tell",
    on_failure="tell",
    on_success="tell",
    max_age=3_600_000,
    notify_shutdown=True,
    pipe_ignore=True,
    store_results=True,
    result_ttl=60_000,
    retry_on={
        RateLimited: RetryPolicy(attempts=3, wait=retry_after(fallback=exponential())),
        (ConnectionError, TimeoutExceeded): 5,
        when(OSError, lambda error: error.errno == 28): RetryPolicy(wait=constant(5_000), then="alert"),
    },
    discard_on=(OrderNotFound, when(OSError, lambda error: error.errno == 2)),
    alert_on=PermissionError,
    broker_rules=False,
    after_discard=lambda message, error: use(message.message_id, error),
    dead_letter_discards=True,
    tags={"team": "billing"},
    timeout=timedelta(seconds=30),
    queue_timeout=3_600_000,
)
def send(order_id: int, email: str = "") -> None: ...


send.send_with_options(args=(1,), delay=timedelta(minutes=1))


@actor(retry_on=RateLimited, discard_on=[OrderNotFound], alert_on={PermissionError}, time_limit=5_000)
async def fetch(url: str) -> bytes:
    return url.encode()


fetched: Message[bytes] = fetch.send("https://example.com")


# Rules that were made elsewhere.
TRANSIENT = (ConnectionError, TimeoutError)
RULES = {RateLimited: RetryPolicy(attempts=3)}


@actor(retry_on=TRANSIENT)
def with_a_tuple() -> None: ...


@actor(retry_on=RULES)
def with_a_mapping() -> None: ...


# Shared sets of options.
MAIL: ActorOptions = {
    "queue_name": "mail",
    "retry_on": {RateLimited: 3},
    "discard_on": OrderNotFound,
    "timeout": 30_000,
    "tags": {"team": "growth"},
}


@actor(**MAIL)
def with_shared_options() -> None: ...


MISSPELT: ActorOptions = {"retryon": RateLimited}  # type: ignore[typeddict-unknown-key]


# Refusals.


@actor(retry_of=RateLimited)  # type: ignore[call-overload, untyped-decorator]
def misspelt() -> None: ...


@actor(discard_on="OrderNotFound")  # type: ignore[arg-type]
def named_by_a_string() -> None: ...


@actor(retry_on=OrderNotFound())  # type: ignore[call-overload, untyped-decorator]
def an_instance() -> None: ...


@actor(timeout="30s")  # type: ignore[call-overload, untyped-decorator]
def a_timeout_in_words() -> None: ...


RetryPolicy(then="retry")  # type: ignore[arg-type]
exponential(initial="15s")  # type: ignore[arg-type]


# Waits.


def by_the_minute(attempt: int, error: BaseException) -> int:
    return attempt * 60_000


RetryPolicy(attempts=3, wait=by_the_minute, max_elapsed=timedelta(hours=1), then="discard")
RetryPolicy(wait=60_000)
RetryPolicy(wait=timedelta(minutes=1))
RetryPolicy(wait=lambda attempt, error: timedelta(minutes=attempt))
RetryPolicy(wait=polynomial(power=4, scale=1_000, offset=2_000, maximum=timedelta(hours=1), jitter=0))
RetryPolicy(wait=retry_after(fallback=constant(1_000), maximum=60_000, now=datetime.now))


# Putting it on a broker, which keeps its type.


def count(event: OutcomeEvent) -> None:
    outcome: Outcome = event.outcome
    name: str = outcome
    reason: str | None = event.reason
    waited: float | None = event.wait_ms
    delay: int | None = event.delay_ms
    error: BaseException | None = event.exception
    tags: Mapping[str, str] | None = event.tags
    use(name, reason, waited, delay, error, tags)
    event.attempt = 5  # type: ignore[misc]


def restart(job: StuckJob) -> None:
    use(job.actor, job.elapsed_ms, job.stack)


def page(alert: QueueAlert) -> None:
    use(alert.queue, alert.measure, alert.value, alert.threshold, alert.cleared)
    alert.value = 0  # type: ignore[misc]


def is_late(error: BaseException) -> bool:
    return True


def told(message: Any, error: BaseException) -> None: ...


broker: StubBroker = install(
    StubBroker(),
    error_classifier=ErrorClassifier(
        retry_on={ConnectionError: 3},
        discard_on="shop.errors.OrderNotFound",
        unclassified=RetryPolicy(attempts=5),
        max_attempts=30,
        alert_interval=timedelta(minutes=5),
        after_discard=told,
        on_outcome=[count],
        max_retries=3,
    ),
    timeout=Timeout(default=60_000, queue_default=timedelta(hours=1), on_stuck=restart),
    discard_logger=DiscardLogger(level="ERROR", log_args=True),
    metrics=Metrics(prefix="shop.jobs"),
    sentry=SentryReporter(report="first"),
    queue_monitor=QueueMonitor(
        interval=timedelta(seconds=15),
        thresholds={"mail": Threshold(ready=1_000, oldest=timedelta(minutes=5)), "*": Threshold(dead=1)},
        on_alert=["log", "sentry", page],
    ),
    heartbeat=Heartbeat("/tmp/alive", interval=10_000),
)
alerts: list[QueueAlert] = QueueMonitor(on_alert=page).check()
ErrorClassifier(
    retry_on=when("requests.HTTPError", is_late),
    discard_on=["shop.errors.OrderNotFound", KeyError],
    alert_on={MemoryError, when(OSError, is_late)},
)
ErrorClassifier(retry_on=3)  # type: ignore[arg-type]
when(3, is_late)  # type: ignore[arg-type]
QueueMonitor(on_alert="mail")  # type: ignore[arg-type]
QueueMonitor(thresholds={"mail": 5})  # type: ignore[dict-item]
Threshold(ready="many")  # type: ignore[arg-type]
DiscardLogger(level={"dead": "CRITICAL", "discarded": 20})
SentryReporter(report="last")  # type: ignore[arg-type]
any_broker: Broker = install(StubBroker(), discard_logger=False)
broker.add_middleware(Timeout(on_stuck="exit"))
dramatiq.set_broker(broker)
install(broker, timeout=30_000)  # type: ignore[arg-type]


# In a job.


def in_a_job() -> None:
    job: CurrentJob = current_job()
    key: str = job.idempotency_key
    left: float | None = job.remaining_ms()
    use(job.message_id, job.actor, job.queue, job.attempt + 1, key, left)
    perhaps: CurrentJob | None = current_job(None)
    use(perhaps)
    named: CurrentJob | str = current_job("none")
    use(named)
    attempt = current_job(None).attempt  # type: ignore[union-attr]
    use(attempt)
    current_job(default=None)  # type: ignore[call-overload]
    raise Snooze(timedelta(minutes=1)) from Discard("already refunded")


try:
    in_a_job()
except ConfigurationError as refused:
    use(refused)


# In a test.


def in_a_test() -> None:
    with testing.stub() as stub_broker, testing.fail(add, ValueError("no"), times=2), testing.hang(add):
        run: testing.Run = testing.drain(stub_broker, until=timedelta(hours=1))
    outcomes: list[str] = run.outcomes(add)
    waits: list[int] = run.waits("add")
    event: OutcomeEvent = testing.perform(add, 1, 2)
    run.assert_outcomes(add, "retried", Outcome.SUCCEEDED)
    testing.assert_crash_safe(add, 1, y=2, effects=list, reset=list)
    testing.fail(add, 5)  # type: ignore[arg-type]
    testing.drain(stub_broker, until="later")  # type: ignore[arg-type]
    use(outcomes, waits, event, run.elapsed + 1, run.dead, run.logs, run.metrics)


use(in_a_test)
