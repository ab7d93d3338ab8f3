"""Warn of messages that your code sends before the commit."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from dramatiq.middleware import Middleware

from ...common.safe_logger import SafeLogger
from ...errors import ConfigurationError

try:
    from django.db import connections
except ImportError as error:
    raise ImportError('dramatiq_policies.contrib.django needs Django: pip install "Django>=4.2"') from error

from .connections import in_atomic_of_the_app
from .outbox import DjangoOutbox

if TYPE_CHECKING:
    from types import FrameType

    from dramatiq import Message
    from dramatiq.broker import Broker

__all__ = ["SentInsideAtomic", "WarnInsideAtomic"]

logger = SafeLogger("dramatiq_policies.django")


# Its base is a MiddlewareError: Dramatiq swallows all other errors of a hook.
class SentInsideAtomic(ConfigurationError):
    """A message was sent inside ``atomic()``. Raised by ``WarnInsideAtomic(strict=True)`` only."""


class WarnInsideAtomic(Middleware):
    """Warns when a message is sent inside ``transaction.atomic()``: once per actor and line of code in each process.

    Three places don't count: the blocks of Django's ``TestCase`` around each test, ``on_commit`` callbacks, and transactions on the
    database of a `DjangoOutbox`.
    The record is on the logger ``dramatiq_policies.django``, with ``actor``, ``call_site`` ("file:line") and
    ``database`` as ``extra``.

    Parameters:
      strict: Raise `SentInsideAtomic` instead, and send nothing; for tests. Default False.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self._seen: set[tuple[str, str]] = set()

    def before_enqueue(self, broker: Broker, message: Message[Any], delay: int | None) -> None:
        for connection in connections.all(initialized_only=True):
            if in_atomic_of_the_app(connection) and not _covers(broker, connection.alias):
                self._report(message.actor_name, connection.alias)
                return

    def _report(self, actor: str, database: str) -> None:
        call_site = _call_site()
        text = (
            f"A message of actor {actor!r} is sent inside transaction.atomic() at {call_site}: a worker may run the job "
            f"before the transaction on database {database!r} commits, or after a rollback. "
            f"Write transaction.on_commit(partial({actor}.send, ...))."
        )
        if self.strict:
            raise SentInsideAtomic(text)
        if (actor, call_site) not in self._seen:
            self._seen.add((actor, call_site))
            logger.warning(text, extra={"actor": actor, "call_site": call_site, "database": database})


def _covers(broker: Broker, alias: str) -> bool:
    """Whether an outbox of the broker writes what is sent inside of a transaction on this database."""
    return any(isinstance(one, DjangoOutbox) and one.using == alias for one in broker.middleware)


def _call_site() -> str:
    """Return the innermost line outside dramatiq_policies and Dramatiq."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in ("dramatiq", "dramatiq_policies", "django_dramatiq"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown place"
