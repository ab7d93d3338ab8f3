"""FastAPI (or Starlette): send from async code, and close the broker when the application ends.

pip install fastapi uvicorn
uvicorn examples.fastapi_shop:app      dramatiq examples.fastapi_shop
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.errors import BrokerConnectionError
from fastapi import FastAPI, HTTPException

from dramatiq_policies import ErrorClassifier, RetryPolicy, current_job, install

BROKER_URL = os.environ.get("BROKER_URL", "redis://localhost:6379/0")
broker = StubBroker() if BROKER_URL.startswith("stub") else RedisBroker(url=BROKER_URL)
install(broker, error_classifier=ErrorClassifier(unclassified=RetryPolicy(attempts=5)))
# For async jobs. The worker's event loop is not the web server's: don't share clients between them.
broker.add_middleware(dramatiq.middleware.AsyncIO())
dramatiq.set_broker(broker)

told: list[tuple[int, int]] = []


@dramatiq.actor(
    queue_name="mail",
    retry_on={ConnectionError: 5},
    discard_on=(),
    idempotency_key="order-confirmation:{order_id}",
    timeout=timedelta(seconds=30),
)
async def send_confirmation(order_id: int) -> None:
    """Tell the customer that the order has arrived."""
    await asyncio.sleep(0)
    told.append((order_id, current_job().attempt))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    broker.close()


app = FastAPI(lifespan=lifespan)


@app.post("/orders/{order_id}", status_code=202)
async def place_order(order_id: int) -> dict[str, str]:
    """send() waits for the broker: call it on a thread, so that the event loop continues."""
    try:
        message = await asyncio.to_thread(send_confirmation.send, order_id)
    except (BrokerConnectionError, OSError):
        raise HTTPException(503, "The order could not be passed on. Try again.") from None
    return {"job": message.message_id}
