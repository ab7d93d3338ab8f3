"""FastAPI with SQLAlchemy: an order and its message in one transaction, a payment and its key in another.

pip install fastapi uvicorn aiosqlite
uvicorn examples.fastapi_transactions:app      dramatiq examples.fastapi_transactions

DATABASE_URL is an SQLite file by default. Another database: postgresql+asyncpg://user:password@localhost/shop, or
mariadb+asyncmy://user:password@localhost/shop.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from fastapi import FastAPI, HTTPException
from sqlalchemy import ForeignKey, String
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from dramatiq_policies import ErrorClassifier, Idempotency, RetryPolicy, current_job, install
from dramatiq_policies.sql import SqlOutbox, SqlStore, metadata

engine = create_async_engine(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///shop.db"))
outbox = SqlOutbox(engine)

BROKER_URL = os.environ.get("BROKER_URL", "redis://localhost:6379/0")
broker = StubBroker() if BROKER_URL.startswith("stub") else RedisBroker(url=BROKER_URL)
# For async jobs, which run on the worker's event loop.
broker.add_middleware(dramatiq.middleware.AsyncIO())
install(
    broker,
    outbox=outbox,
    idempotency=Idempotency(SqlStore(engine)),
    error_classifier=ErrorClassifier(
        retry_on={OperationalError: RetryPolicy(attempts=5)}, unclassified=RetryPolicy(attempts=5)
    ),
)
dramatiq.set_broker(broker)


class Base(DeclarativeBase):
    """The tables of the shop."""


class Order(Base):
    """An order of a customer."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(String(254))
    total: Mapped[int]


class Payment(Base):
    """The payment of an order. Nothing in the table forbids a second payment: the job's key does."""

    __tablename__ = "payments"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id"))


receipts: list[tuple[int, str]] = []


@dramatiq.actor(
    queue_name="mail",
    retry_on={ConnectionError: 5},
    discard_on=(),
    idempotency_key="receipt:{order_id}",
    timeout=timedelta(seconds=30),
)
async def send_receipt(order_id: int, email: str) -> None:
    """Send the customer a receipt."""
    receipts.append((order_id, email))


@dramatiq.actor(
    queue_name="payments",
    retry_on={ConnectionError: 5},
    discard_on=(),
    idempotency_key="charge:{order_id}",
    transactional=True,
    timeout=timedelta(seconds=30),
)
async def charge(order_id: int) -> None:
    """Record the payment of an order: the payment, the key and the receipt's message are committed together."""
    session = current_job().session
    order = await session.get_one(Order, order_id)
    session.add(Payment(order_id=order.id))
    send_receipt.send(order.id, order.email)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with engine.begin() as connection:  # in production: migrations
        await connection.run_sync(Base.metadata.create_all)
        await connection.run_sync(metadata.create_all)
    yield
    broker.close()
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


@app.post("/orders", status_code=202)
async def place_order(email: str, total: int) -> dict[str, int]:
    """The message is a row of the order's transaction. The broker may be down: the relay of a worker sends it later."""
    async with AsyncSession(engine) as session, session.begin(), outbox.within(session):
        order = Order(email=email, total=total)
        session.add(order)
        await session.flush()
        charge.send(order.id)
        if total <= 0:
            raise HTTPException(422, "The total must be positive.")  # rolls the order and the message back
        return {"order": order.id}
