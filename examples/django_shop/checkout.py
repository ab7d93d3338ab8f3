from __future__ import annotations

from functools import partial

from django.db import transaction

from .models import Order
from .tasks import send_confirmation


@transaction.atomic
def place_order(email: str) -> Order:
    """Send the message after the commit, and not after a rollback."""
    order = Order.objects.create(email=email)
    transaction.on_commit(partial(send_confirmation.send, order.pk))
    return order


@transaction.atomic
def place_order_too_early(email: str) -> Order:
    """Don't do this: WarnInsideAtomic logs a warning."""
    order = Order.objects.create(email=email)
    send_confirmation.send(order.pk)
    return order
