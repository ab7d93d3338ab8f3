from __future__ import annotations

from django.db import models


class Order(models.Model):
    """An order. ``mails`` counts the confirmations."""

    email = models.EmailField()
    mails = models.IntegerField(default=0)

    def __str__(self) -> str:
        return f"order {self.pk}"


class Payment(models.Model):
    """Money that has arrived for an order."""

    order = models.ForeignKey(Order, models.PROTECT)
    cents = models.IntegerField()

    def __str__(self) -> str:
        return f"{self.cents / 100:.2f} for order {self.order_id}"
