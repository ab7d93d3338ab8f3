"""A process that takes orders, each with its messages in one transaction, and may be killed at any moment.

Its database knows how far it came: it goes on with the order after the last one that was committed.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.orm import Session

from .orders import message, send_for
from .transactional_app import broker, engine, outbox
from .transactional_worker import orders

#: Orders a second.
RATE = 20


def main() -> None:
    wanted, enough = int(os.environ["CHAOS_JOBS"]), Path(os.environ["CHAOS_ENOUGH"])
    while True:
        try:
            if (taken := count()) >= wanted and enough.exists():
                # Until a signal comes.
                time.sleep(0.1)
                continue
            take(taken)
        except sa.exc.DBAPIError:
            # Down, or lost: whether it has committed is seen in the database.
            time.sleep(0.1)
        time.sleep(1 / RATE)


def count() -> int:
    with engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(orders)) or 0


def take(number: int) -> None:
    if number % 5 == 4:
        with Session(engine) as session, outbox.within(session):
            broker.enqueue(message("never", number))
            session.rollback()
    with Session(engine) as session, session.begin(), outbox.within(session):
        session.execute(orders.insert(), {"number": number})
        send_for(number, broker)


if __name__ == "__main__":
    main()
