"""The jobs. Run them with ``dramatiq examples.orders.app``, and send some with ``python -m examples.orders.produce``.

Environment:
  BROKER_URL: ``redis://…``, ``amqp://…`` or ``stub://``. Default ``redis://localhost:6379/0``.
  IDEMPOTENCY_URL: The Redis for the idempotency records. Default: the broker's own, or for RabbitMQ
    ``redis://localhost:6379/0``.
  MAIL_API_KEY: The gateway's key. If empty, the jobs alert.
  ORDERS_WAIT_MS: The first wait of a retry, in milliseconds. Default 2000; a demo uses less.
  ORDERS_TIMEOUT_MS: How long the confirmation may take, in milliseconds. Default 30000.
  STATSD_HOST, STATSD_PORT: The StatsD server for metrics. Default: no metrics.
  SENTRY_DSN: The Sentry project for failures. Default: no reports.
  HEARTBEAT_FILE: The file for a liveness probe. None by default.
"""

from __future__ import annotations

import os
from datetime import timedelta

import dramatiq
from dramatiq.broker import Broker

from dramatiq_policies import (
    ActorOptions,
    ErrorClassifier,
    Heartbeat,
    Idempotency,
    Metrics,
    QueueMonitor,
    RetryPolicy,
    SentryReporter,
    Threshold,
    TimeoutExceeded,
    constant,
    current_job,
    exponential,
    install,
    retry_after,
)

from . import shop
from .gateway import EmailTimeout, InvalidEmail, MailGateway, MissingCredentials, RateLimited
from .shop import BadRow, OrderNotFound

FIRST_WAIT = timedelta(milliseconds=int(os.environ.get("ORDERS_WAIT_MS", "2000")))
TIMEOUT_MS = int(os.environ.get("ORDERS_TIMEOUT_MS", "30000"))
BATCH = 100
#: A day's wait for the gateway helps nobody; the job's own timeout may leave less.
GATEWAY_TIMEOUT_MS = 5_000


def make_broker(url: str) -> Broker:
    """Make the broker of a URL, and import only this broker's client."""
    scheme = url.partition(":")[0]
    if scheme in ("redis", "rediss"):
        from dramatiq.brokers.redis import RedisBroker

        return RedisBroker(url=url)
    if scheme in ("amqp", "amqps"):
        from dramatiq.brokers.rabbitmq import RabbitmqBroker

        return RabbitmqBroker(url=url)
    if scheme == "stub":
        from dramatiq.brokers.stub import StubBroker

        return StubBroker()
    raise ValueError(f"BROKER_URL: expected redis://, amqp:// or stub://, got {url!r}.")


def make_idempotency(broker: Broker) -> Idempotency:
    """Make the idempotency middleware: on the broker's own Redis (in memory on a StubBroker), or on IDEMPOTENCY_URL."""
    url = os.environ.get("IDEMPOTENCY_URL")
    if url is None and type(broker).__name__ != "RabbitmqBroker":
        return Idempotency()
    from dramatiq_policies.stores.redis import RedisStore

    # If the store is down, the jobs run all the same: the gateway knows the key, and a second import changes nothing.
    return Idempotency(RedisStore.from_url(url or "redis://localhost:6379/0"), on_store_error="run")


sentry_dsn = os.environ.get("SENTRY_DSN")
if sentry_dsn:
    import sentry_sdk

    # Call it before the broker is made: Sentry's own integration records transactions.
    sentry_sdk.init(dsn=sentry_dsn, traces_sample_rate=0.1)

broker = make_broker(os.environ.get("BROKER_URL", "redis://localhost:6379/0"))
statsd, alive = os.environ.get("STATSD_HOST"), os.environ.get("HEARTBEAT_FILE")
install(
    broker,
    # Bounds the errors that no rule names; Dramatiq would retry them for weeks.
    error_classifier=ErrorClassifier(unclassified=RetryPolicy(attempts=5)),
    idempotency=make_idempotency(broker),
    metrics=Metrics() if statsd else None,
    sentry=SentryReporter() if sentry_dsn else None,
    queue_monitor=QueueMonitor(
        interval=5_000,
        thresholds={
            "orders_mail": Threshold(ready=1_000, oldest=300_000, stalled=60_000, dead=100),
            "*": Threshold(ready=10_000, dead=100),
        },
    ),
    heartbeat=Heartbeat(alive) if alive else None,
)
dramatiq.set_broker(broker)

gateway = MailGateway(api_key=os.environ.get("MAIL_API_KEY", "secret") or None)


@dramatiq.actor(
    queue_name="orders_mail",
    retry_on={
        EmailTimeout: RetryPolicy(attempts=5, wait=exponential(initial=FIRST_WAIT, maximum=timedelta(minutes=1))),
        # By time, not by number: the limit is no fault of this message. See docs/rate-limited-services.md.
        RateLimited: RetryPolicy(
            attempts=100, max_elapsed=timedelta(hours=1), wait=retry_after(fallback=exponential(initial=FIRST_WAIT))
        ),
        # Perhaps the order is not committed yet: try again, then give up.
        OrderNotFound: RetryPolicy(attempts=3, wait=constant(FIRST_WAIT), then="discard"),
        # The mail may be out. The gateway knows the key and sends no second mail.
        TimeoutExceeded: RetryPolicy(attempts=2, wait=constant(FIRST_WAIT)),
    },
    discard_on=InvalidEmail,
    alert_on=MissingCredentials,
    idempotency_key="order-confirmation:{order_id}",
    timeout=TIMEOUT_MS,
    tags={"team": "checkout", "criticality": "high"},
    policy_exempt={"DP006": "the gateway sends no second mail for a key that it knows"},
)
def send_confirmation(order_id: int, email: str, total: str) -> None:
    """Tell the customer that the order has arrived."""
    shop.find_order(order_id)
    job = current_job(None)
    # In a direct call, as from a shell, there is no job: make the key from the order.
    key = f"order-confirmation:{order_id}" if job is None else job.idempotency_key
    left = None if job is None else job.remaining_ms()
    gateway.send(
        email,
        f"Order {order_id}: {total}",
        idempotency_key=key,
        timeout_ms=GATEWAY_TIMEOUT_MS if left is None else min(GATEWAY_TIMEOUT_MS, left),
    )


@dramatiq.actor(
    queue_name="orders_import",
    # It meets the broker only. Its errors go by `unclassified`.
    retry_on=(),
    discard_on=(),
    timeout=60_000,
    tags={"team": "logistics"},
    policy_exempt={"DP006": "its batches write what is there already"},
)
def import_orders(first: int, last: int) -> None:
    """Split an import into batches, each a job with its own retries.

    A second run sends the batches again, which changes nothing.
    """
    for start in range(first, last + 1, BATCH):
        import_batch.send(start, min(start + BATCH - 1, last))


@dramatiq.actor(
    queue_name="orders_import",
    retry_on={(ConnectionError, TimeoutExceeded): RetryPolicy(attempts=5, wait=exponential(initial=FIRST_WAIT))},
    discard_on=BadRow,
    dead_letter_discards=True,
    # The message's own id: the same batch may be imported again another day.
    idempotent=True,
    timeout=60_000,
    tags={"team": "logistics"},
    policy_exempt={"DP006": "an order written twice is the same order"},
)
def import_batch(first: int, last: int) -> None:
    """Write the orders of a batch. An invalid row discards the batch and leaves a dead letter."""
    for order_id in range(first, last + 1):
        shop.upsert(order_id, 1_000 + order_id)


REPORT: ActorOptions = {
    "queue_name": "orders_reports",
    "discard_on": (),
    "timeout": 120_000,
    "tags": {"team": "finance"},
    "policy_exempt": {"DP006": "it reads, and the gateway sends no second mail for a key that it knows"},
}


@dramatiq.actor(retry_on=(), **REPORT)
def collect_figures(day: str) -> dict[str, object]:
    """Collect the figures: the first step of the nightly report."""
    return {"day": day, "orders": len(shop.imported), "cents": sum(shop.imported.values())}


@dramatiq.actor(retry_on=(), **REPORT)
def render_report(figures: dict[str, object]) -> str:
    """Render the report: the second step, with the result of the first."""
    return f"{figures['day']}: {figures['orders']} orders, {figures['cents']} cents"


@dramatiq.actor(retry_on={EmailTimeout: 5}, alert_on=MissingCredentials, **REPORT)
def mail_report(to: str, report: str) -> None:
    """Mail the report: the last step."""
    gateway.send(to, report, idempotency_key=current_job().idempotency_key, timeout_ms=GATEWAY_TIMEOUT_MS)


def nightly_report(day: str, to: str = "finance@example.com") -> dramatiq.pipeline:
    """Make the pipeline of a day's report: each job is sent after the success of the job before."""
    stages = [collect_figures.message(day), render_report.message(), mail_report.message(to)]
    return dramatiq.pipeline(stages, broker=broker)
