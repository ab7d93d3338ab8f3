from __future__ import annotations

from django.db import transaction

from .models import Order
from .tasks import send_confirmation


@transaction.atomic
def place_order(email: str) -> Order:
    """Send the message with the transaction: after the commit, and never after a rollback."""
    order = Order.objects.create(email=email)
    send_confirmation.send(order.pk)
    return order
