"""The jobs. django_dramatiq finds them by the name of this module."""

from __future__ import annotations

from datetime import timedelta

import dramatiq
from django.db.models import F

from dramatiq_policies import RetryPolicy, constant, current_job, exponential

from . import mail
from .models import Order, Payment


@dramatiq.actor(
    queue_name="mail",
    retry_on={
        # Somebody has deleted the order: try again, then give up.
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


@dramatiq.actor(
    queue_name="payments",
    retry_on={Order.DoesNotExist: RetryPolicy(attempts=3, wait=constant(timedelta(seconds=1)))},
    discard_on=(),
    idempotency_key="payment:{transfer_id}",
    transactional=True,
    timeout=timedelta(seconds=30),
)
def book_payment(transfer_id: str, order_id: int, cents: int) -> None:
    """Book a transfer exactly once: the payment, the record of this job and the message are committed together."""
    order = Order.objects.get(pk=order_id)
    Payment.objects.create(order=order, cents=cents)
    send_receipt.send(order_id, cents)


@dramatiq.actor(
    queue_name="mail",
    retry_on={mail.MailTimeout: RetryPolicy(attempts=5, wait=exponential(initial=timedelta(seconds=2)))},
    discard_on=mail.AddressRefused,
    idempotent=True,
    timeout=timedelta(seconds=30),
)
def send_receipt(order_id: int, cents: int) -> None:
    """Tell the customer that the money has arrived."""
    order = Order.objects.get(pk=order_id)
    mail.send(order.email, f"Receipt for {cents / 100:.2f}", key=current_job().idempotency_key)
