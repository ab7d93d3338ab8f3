"""Django: the command ``manage.py policies``, and warnings of messages sent before a commit.

Put ``"dramatiq_policies.contrib.django"`` into ``INSTALLED_APPS``, after ``"django_dramatiq"``::

    python manage.py policies check

If you send a message inside ``atomic()``, a worker may run the job before the commit, and a rollback does not remove the
message. `WarnInsideAtomic` in ``MIDDLEWARE`` logs such places; ``transaction.on_commit`` mends them::

    transaction.on_commit(partial(send_confirmation.send, order.id))
"""

from __future__ import annotations

from .middleware import SentInsideAtomic, WarnInsideAtomic
from .outbox import DjangoOutbox
from .store import DjangoStore

__all__ = ["DjangoOutbox", "DjangoStore", "SentInsideAtomic", "WarnInsideAtomic"]
