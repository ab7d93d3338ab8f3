from __future__ import annotations

from functools import partial

from django.db import transaction

from .models import Order
from .tasks import send_confirmation


@transaction.atomic
def place_order(email: str) -> Order:
    """Send when the order can be seen, and not at all if it is rolled back."""
    order = Order.objects.create(email=email)
    transaction.on_commit(partial(send_confirmation.send, order.pk))
    return order


@transaction.atomic
def place_order_too_early(email: str) -> Order:
    """What not to do; it is warned of."""
    order = Order.objects.create(email=email)
    send_confirmation.send(order.pk)
    return order
