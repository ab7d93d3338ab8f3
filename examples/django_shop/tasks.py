"""The jobs. django_dramatiq finds them by the name of this module."""

from __future__ import annotations

from datetime import timedelta

import dramatiq
from django.db.models import F

from dramatiq_policies import RetryPolicy, constant, current_job, exponential

from . import mail
from .models import Order


@dramatiq.actor(
    queue_name="mail",
    retry_on={
        # Perhaps the order is not committed yet: try again, then give up.
        Order.DoesNotExist: RetryPolicy(attempts=3, wait=constant(timedelta(seconds=1)), then="discard"),
        mail.MailTimeout: RetryPolicy(attempts=5, wait=exponential(initial=timedelta(seconds=2))),
    },
    discard_on=mail.AddressRefused,
    idempotency_key="order-confirmation:{order_id}",
    timeout=timedelta(seconds=30),
)
def send_confirmation(order_id: int) -> None:
    """Tell the customer that the order has arrived."""
    order = Order.objects.get(pk=order_id)
    mail.send(order.email, f"Order {order_id}", key=current_job().idempotency_key)
    Order.objects.filter(pk=order.pk).update(mails=F("mails") + 1)
