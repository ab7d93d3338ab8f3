from __future__ import annotations

from django.tasks import task

from dramatiq_policies.contrib.django.tasks import policy

from .models import Order
from .tasks import add


@task
@policy(idempotency_key="order:{email}", transactional=True)
def place_order(email, fail=False):
    Order.objects.create(email=email)
    add.enqueue(1, 2)
    if fail:
        raise ValueError
