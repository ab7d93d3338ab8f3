"""For Django: the command ``manage.py policies``, and messages that are sent before their transaction has committed.

Put ``"dramatiq_policies.contrib.django"`` into ``INSTALLED_APPS``, after ``"django_dramatiq"``::

    python manage.py policies check

Inside ``atomic()``, a worker may take a message before the row that it is about can be seen, and a rollback leaves a message about
nothing. `WarnInsideAtomic` in ``MIDDLEWARE`` finds the places; ``transaction.on_commit`` mends them::

    transaction.on_commit(partial(send_confirmation.send, order.id))
"""

from __future__ import annotations

from .middleware import SentInsideAtomic, WarnInsideAtomic

__all__ = ["SentInsideAtomic", "WarnInsideAtomic"]
