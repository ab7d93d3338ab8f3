"""The shop's database, in memory."""

from __future__ import annotations


class OrderNotFound(Exception):
    """The order does not exist: its transaction is not committed yet, or was rolled back."""


class BadRow(Exception):
    """A row of the import can't be an order."""


#: Orders from this number on never existed.
FIRST_UNKNOWN = 900_000
#: Orders before their commit.
uncommitted: set[int] = set()
#: Imported orders: cents by order number.
imported: dict[int, int] = {}


def find_order(order_id: int) -> int:
    """The order's number.

    Raises:
      OrderNotFound: The order does not exist, or not yet.
    """
    if order_id >= FIRST_UNKNOWN or order_id in uncommitted:
        raise OrderNotFound(order_id)
    return order_id


def upsert(order_id: int, cents: int) -> None:
    """Write an order. A second write changes nothing.

    Raises:
      BadRow: The price is negative.
    """
    if cents < 0:
        raise BadRow(f"order {order_id} costs {cents} cents")
    imported[order_id] = cents
