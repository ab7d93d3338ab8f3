"""The shop's database, in memory."""

from __future__ import annotations


class OrderNotFound(Exception):
    """There is no such order: its transaction has not committed yet, or it was rolled back."""


class BadRow(Exception):
    """A row of the import can't be an order."""


#: Orders from this number on never existed.
FIRST_UNKNOWN = 900_000
#: Orders whose transaction has not committed yet.
uncommitted: set[int] = set()
#: What the import has written: cents by order.
imported: dict[int, int] = {}


def find_order(order_id: int) -> int:
    """The order's number.

    Raises:
      OrderNotFound: It is not there, or not there yet.
    """
    if order_id >= FIRST_UNKNOWN or order_id in uncommitted:
        raise OrderNotFound(order_id)
    return order_id


def upsert(order_id: int, cents: int) -> None:
    """Write an order; written twice, it is the same order.

    Raises:
      BadRow: It costs less than nothing.
    """
    if cents < 0:
        raise BadRow(f"order {order_id} costs {cents} cents")
    imported[order_id] = cents
