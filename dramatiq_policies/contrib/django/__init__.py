"""Django: an outbox and idempotency keys in your database, and the command ``manage.py policies``.

Put ``"dramatiq_policies.contrib.django"`` into ``INSTALLED_APPS``, after ``"django_dramatiq"``::

    python manage.py migrate
    python manage.py policies check

With `DjangoOutbox` in ``MIDDLEWARE`` a message that you send inside ``atomic()`` is a row of the transaction::

    @transaction.atomic
    def place_order(email):
        order = Order.objects.create(email=email)
        send_confirmation.send(order.pk)

Without an outbox, a worker may run the job before the commit, and a rollback does not remove the message. `WarnInsideAtomic`
logs such places; send with ``transaction.on_commit`` there::

    transaction.on_commit(partial(send_confirmation.send, order.pk))
"""

from __future__ import annotations

from .middleware import SentInsideAtomic, WarnInsideAtomic
from .outbox import DjangoOutbox
from .store import DjangoStore

__all__ = ["DjangoOutbox", "DjangoStore", "SentInsideAtomic", "WarnInsideAtomic", "tasks"]
