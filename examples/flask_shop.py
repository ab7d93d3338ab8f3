"""Flask: run jobs in the application's context.

flask --app examples.flask_shop run      dramatiq examples.flask_shop
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from flask import Flask, current_app

from dramatiq_policies import ErrorClassifier, RetryPolicy, install

BROKER_URL = os.environ.get("BROKER_URL", "redis://localhost:6379/0")
broker = StubBroker() if BROKER_URL.startswith("stub") else RedisBroker(url=BROKER_URL)
install(broker, error_classifier=ErrorClassifier(unclassified=RetryPolicy(attempts=5)))
dramatiq.set_broker(broker)

app = Flask(__name__)
app.config["SENDER"] = "shop@example.com"
app.extensions["outbox"] = []


def in_app_context(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a job below ``@dramatiq.actor``. The context ends with the job, also after a failure or an interruption."""

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        with app.app_context():
            return fn(*args, **kwargs)

    return run


@dramatiq.actor(
    queue_name="mail",
    retry_on={ConnectionError: 5},
    discard_on=(),
    idempotency_key="order-confirmation:{order_id}",
    timeout=timedelta(seconds=30),
)
@in_app_context
def send_confirmation(order_id: int) -> None:
    """Tell the customer that the order has arrived."""
    current_app.extensions["outbox"].append((current_app.config["SENDER"], order_id))


@app.post("/orders/<int:order_id>")
def place_order(order_id: int) -> tuple[dict[str, str], int]:
    return {"job": send_confirmation.send(order_id).message_id}, 202
