"""Sends a mix of jobs: ``python -m examples.orders.produce [HOW_OFTEN]``."""

from __future__ import annotations

import sys
from datetime import date

from .app import broker, import_orders, nightly_report, send_confirmation
from .shop import FIRST_UNKNOWN

#: The customers. The gateway's docstring has the behaviour of each address.
CUSTOMERS = ("ada", "grace", "flaky", "busy", "edsger", "nobody", "down")


def produce(times: int = 1) -> int:
    """Send the mix ``times`` times, and return the number of messages."""
    sent = 0
    for round_ in range(times):
        first = round_ * 1_000
        for number, who in enumerate(CUSTOMERS, 1):
            send_confirmation.send(first + number, f"{who}@example.com", f"{number * 10}.00 EUR")
        send_confirmation.send(FIRST_UNKNOWN + round_, "ada@example.com", "0.00 EUR")
        import_orders.send(first + 1, first + 1_000)
        nightly_report(date.today().isoformat()).run()  # noqa: DTZ011 - the day of the shop's own clock
        sent += len(CUSTOMERS) + 3
    return sent


if __name__ == "__main__":
    count = produce(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    print(f"{count} messages are on their way; `dramatiq examples.orders.app` runs them.")
    broker.close()
