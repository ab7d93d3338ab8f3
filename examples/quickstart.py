"""A dozen jobs with their outcomes, on a StubBroker with a real worker, without a server. Run: `make demo`."""

from __future__ import annotations

import logging
import os
import queue
import sys
import time
from collections import Counter
from datetime import timedelta

import dramatiq
from dramatiq import Message, Worker
from dramatiq.brokers.stub import StubBroker

from dramatiq_policies import (
    Discard,
    ErrorClassifier,
    Outcome,
    OutcomeEvent,
    RetryPolicy,
    Snooze,
    TimeoutExceeded,
    constant,
    current_job,
    exponential,
    install,
    retry_after,
)

COLOUR = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
CODES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "magenta": 35, "cyan": 36}
COLOUR_OF = {
    Outcome.SUCCEEDED: "green",
    Outcome.RETRIED: "yellow",
    Outcome.DEFERRED: "cyan",
    Outcome.DUPLICATE: "cyan",
    Outcome.DISCARDED: "magenta",
    Outcome.ALERTED: "red",
    Outcome.DEAD: "red",
}


def ms(number: int) -> timedelta:
    return timedelta(milliseconds=number)


def paint(text: str, colour: str) -> str:
    return f"\033[{CODES[colour]}m{text}\033[0m" if COLOUR else text


# The errors of this shop.


class MailTimeout(Exception):
    """The mail gateway did not answer."""


class RateLimited(Exception):
    """The mail gateway wants us to wait."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"come back in {seconds} s")
        self.retry_after = seconds


class InvalidEmail(Exception):
    """The address does not exist."""


class OrderNotFound(Exception):
    """The order is not committed yet, or never will be."""


class MissingCredentials(Exception):
    """Somebody must set the API key."""


# The broker. `unclassified` is the rule for errors without a rule. Each outcome goes to a queue, for the transcript below.

events: queue.Queue[OutcomeEvent] = queue.Queue()
unclassified = RetryPolicy(attempts=5, wait=constant(ms(50)))
broker = install(StubBroker(), error_classifier=ErrorClassifier(unclassified=unclassified, on_outcome=events.put))
dramatiq.set_broker(broker)


# The jobs. Waits are short for the demo.


@dramatiq.actor(
    retry_on={
        MailTimeout: RetryPolicy(attempts=3, wait=exponential(initial=ms(100), maximum=ms(1_000))),
        RateLimited: RetryPolicy(attempts=100, max_elapsed=timedelta(hours=1), wait=retry_after()),
        OrderNotFound: RetryPolicy(attempts=3, wait=constant(ms(80)), then="discard"),
    },
    discard_on=InvalidEmail,
    alert_on=MissingCredentials,
    idempotency_key="order-confirmation:{order_id}",
)
def send_confirmation(order_id: int, email: str) -> None:
    gateway(email, current_job().attempt)


@dramatiq.actor
def refund(order_id: int) -> None:
    raise Discard(f"order {order_id} is refunded already")


@dramatiq.actor
def pick_order(order_id: int) -> None:
    if time.monotonic() < warehouse_opens:
        raise Snooze(150, "the warehouse is closed")


@dramatiq.actor(timeout=ms(200), retry_on={TimeoutExceeded: RetryPolicy(attempts=2, wait=constant(ms(100)))})
def render_invoice(order_id: int) -> None:
    while current_job().attempt == 1:  # the first attempt never ends
        time.sleep(0.01)


@dramatiq.actor
def sync_stock(sku: str) -> None:
    raise KeyError(sku)


def gateway(email: str, attempt: int) -> None:
    """A fake mail gateway: the address selects the behaviour."""
    who = email.partition("@")[0]
    if (who == "slow" and attempt < 3) or who == "dead":
        raise MailTimeout("no answer within 5 s")
    if who == "busy" and attempt == 1:
        raise RateLimited(0.3)
    if who == "nobody":
        raise InvalidEmail(email)
    if who == "ghost":
        raise OrderNotFound("no such order")
    if who == "keyless":
        raise MissingCredentials("MAIL_API_KEY is not set")


JOBS: list[tuple[str, Message[object]]] = [
    ("It works", send_confirmation.message(1, "ada@example.com")),
    ("Was sent twice by mistake, and runs once", send_confirmation.message(1, "ada@example.com")),
    ("Times out twice, then works", send_confirmation.message(2, "slow@example.com")),
    ("Times out until its attempts are used up", send_confirmation.message(3, "dead@example.com")),
    ("Is asked to come back later (retry_after)", send_confirmation.message(4, "busy@example.com")),
    ("Will never work, so it is discarded", send_confirmation.message(5, "nobody@example.com")),
    ('Not there yet? Three tries, then="discard"', send_confirmation.message(6, "ghost@example.com")),
    ("Somebody must repair it, so it alerts", send_confirmation.message(7, "keyless@example.com")),
    ("Decides itself: raise Discard(...)", refund.message(8)),
    ("Puts itself off: raise Snooze(150)", pick_order.message(9)),
    ("Runs into its timeout, then works", render_invoice.message(10)),
    ("Fails as no rule names: unclassified=RetryPolicy(attempts=5)", sync_stock.message("KB-11")),
]


# The transcript.


def describe(event: OutcomeEvent) -> str:
    outcome = paint(f"{event.outcome.value:<10}", COLOUR_OF[event.outcome])
    details = [] if event.reason is None else [event.reason]
    if event.delay_ms is not None:
        details.append(f"again in {event.delay_ms} ms")
    if event.exception is not None and event.outcome is not Outcome.DEFERRED:
        details.append(f"{type(event.exception).__name__}: {event.exception}")
    return f"      {paint(f'attempt {event.attempt}', 'dim')}  {outcome}  {', '.join(details)}".rstrip()


def follow(message: Message[object]) -> OutcomeEvent:
    """Print the outcomes of a message up to the last."""
    broker.enqueue(message)
    while True:
        event = events.get(timeout=10)
        print(describe(event), flush=True)
        if event.outcome not in (Outcome.RETRIED, Outcome.DEFERRED):
            return event


def print_table(ends: list[OutcomeEvent]) -> None:
    print(paint(f"{'#':>3}  {'actor':<18} {'attempts':>8}  {'outcome':<10}  why", "bold"))
    for number, event in enumerate(ends, 1):
        why = [event.reason or "", type(event.exception).__name__ if event.exception is not None else ""]
        outcome = paint(f"{event.outcome.value:<10}", COLOUR_OF[event.outcome])
        line = f"{number:>3}  {event.actor:<18} {event.attempt or 1:>8}  {outcome}  {' '.join(filter(None, why))}"
        print(line.rstrip())


def print_dead_letters() -> None:
    print(paint("The dead letters say why:", "bold"))
    for message in broker.dead_letters:
        failure = message.options["failure"]
        why = failure["outcome"] if failure["reason"] is None else f"{failure['outcome']}, {failure['reason']}"
        print(f"  {message}")
        print(paint(f"      {why} after {failure['attempts']} x: {failure['exception']}: {failure['message']}", "dim"))


class Records(logging.Handler):
    """Keeps log records; the transcript ends with a record of each level."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record)


def print_log(records: list[logging.LogRecord]) -> None:
    counts = Counter(record.levelname for record in records)
    print(paint(f"The log has {', '.join(f'{n} x {level}' for level, n in counts.items())}, such as:", "bold"))
    for level in counts:
        record = next(record for record in records if record.levelname == level)
        print(paint(f"  {record.levelname:<8} {record.name}: {record.getMessage()}", "dim"))


if __name__ == "__main__":
    records = Records()
    logging.basicConfig(level=logging.WARNING, handlers=[records])
    warehouse_opens = time.monotonic() + 3_600
    worker = Worker(broker, worker_threads=1, worker_timeout=20)
    worker.start()
    ends = []
    try:
        for number, (title, message) in enumerate(JOBS, 1):
            print(f"{number:>3}  {paint(title, 'bold')}\n      {message}")
            if message.actor_name == pick_order.actor_name:
                warehouse_opens = time.monotonic() + 0.1
            ends.append(follow(message))
            print()
        for queue_name in list(broker.queues):
            broker.join(queue_name, timeout=5_000, fail_fast=False)
    finally:
        worker.stop()
    print_table(ends)
    print()
    print_dead_letters()
    print()
    print_log(records.kept)
