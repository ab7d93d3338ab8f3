"""The jobs. django_dramatiq finds them by the name of this module."""

from __future__ import annotations

import dramatiq
from django.db.models import F

from dramatiq_policies import RetryPolicy, constant

from .models import Order


@dramatiq.actor(
    queue_name="mail",
    # Not committed yet? Then it is there in a moment, or never.
    retry_on={Order.DoesNotExist: RetryPolicy(attempts=3, wait=constant(50), then="discard")},
    timeout=30_000,
)
def send_confirmation(order_id: int) -> None:
    """The customer learns that the order was taken."""
    order = Order.objects.get(pk=order_id)
    Order.objects.filter(pk=order.pk).update(mails=F("mails") + 1)
