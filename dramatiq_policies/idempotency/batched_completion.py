"""Completions that go out with the claim of the next job, ahead of it: one wait for each job instead of two.

TCP calls it piggybacking (RFC 1122, 4.2.3.2: an acknowledgement waits a little for data to go along with). A worker thread
that has ended a job posts what completes its key (and, where the broker's Redis is also the store, acks it) and takes its
next message. That this changes no guarantee rests on four rules:

- A thread begins no job before its last one is remembered: whatever it calls to begin carries what was posted, and waits.
- Nothing stays posted while threads are idle. After posting, and after every ack, a thread looks whether a message waits
  for a worker thread. If none does it sends; if one does, who takes it begins it, or acks it and looks again.
- No code of the user's runs in between, nor on another thread than that of its job. So only plain successes are posted,
  nobody of the user's is told of them, and no middleware of another's has a hook before a job or after an ack.
- Any answer but the expected one, and any error, has the message settled in the ordinary way, by who got that answer.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from dramatiq.errors import BrokerConnectionError
from dramatiq.middleware import Middleware

from .._redis import CommandBatcher, DeferredCommand
from ..common.forks import after_fork
from ..common.safe_logger import SafeLogger
from ..delivery.settlement import settle_and_ack

if TYPE_CHECKING:
    from dramatiq.broker import MessageProxy

    from ..delivery.broker_state import BrokerState
    from ..delivery.delivery import Delivery
    from ..delivery.transport import Transport
    from .claims import Claims

__all__ = ["BatchedCompletions"]

logger = SafeLogger("dramatiq_policies.outcomes")

#: Hooks that may hold up a thread between two jobs, or count on an ack that has been answered.
_HOOKS = ("before_process_message", "after_ack")
#: Whose hooks are known to do neither.
_KNOWN = ("dramatiq", "dramatiq_policies", "sentry_sdk")
#: How long a thread waits, in seconds, before it tries once more to ack for another. As Dramatiq's own.
_AGAIN = 5.0


class BatchedCompletions:
    """What the worker threads of one broker have posted.

    Parameters:
      claims: Whose store it is.
      trips: What the store shares its round trips by.
    """

    def __init__(self, state: BrokerState, claims: Claims, trips: CommandBatcher) -> None:
        self.state = state
        self.claims = claims
        self.trips = trips
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        """In a new process nothing is posted."""
        self._last = threading.local()

    @staticmethod
    def is_safe(state: BrokerState) -> bool:
        """Whether no hook of another's runs between the end of a job and the beginning of the next."""
        return not any(
            getattr(type(middleware), hook) is not getattr(Middleware, hook)
            and type(middleware).__module__.partition(".")[0] not in _KNOWN
            for middleware in state.broker.middleware
            for hook in _HOOKS
        )

    def post(self, transport: Transport, message: MessageProxy, delivery: Delivery) -> bool:
        """Post the completion of a plain success, if somebody is to carry it soon.

        Returns:
          False if the message is to be settled in the ordinary way.
        """
        if not delivery.completes_key() or not delivery.is_plain_success() or self.state.successes_observed:
            return False
        if not _has_more(threading.current_thread()):
            return False
        command, acks = transport.completion(delivery)

        def told(answer: Any) -> None:
            if not isinstance(answer, Exception) and answer:
                delivery.claim.completed()
                delivery.claim = None
                if acks:
                    transport.acked_by_completion(delivery)
            self._settle(transport, message, delivery)

        self._last.post = post = DeferredCommand(command, told)
        self.trips.post(post)
        return True

    def _settle(self, transport: Transport, message: MessageProxy, delivery: Delivery) -> None:
        while True:
            try:
                settle_and_ack(self.state, transport, message, delivery)
                return
            except BrokerConnectionError as error:
                logger.warning("Message %s can't be acked yet: %s", message.message_id, error)
                self.state.stopping.wait(_AGAIN)
            except Exception:
                logger.exception("Message %s could not be acked; it comes back.", message.message_id)
                return

    def look(self) -> None:
        """After an ack: if no message waits for a thread, nobody else will carry what was posted."""
        if self.trips.posted and not _has_more(threading.current_thread()):
            self.flush()

    def flush(self) -> None:
        """Send what was posted, and wait until all that this thread has posted is answered."""
        last: DeferredCommand | None = getattr(self._last, "post", None)
        if self.trips.posted or not (last is None or last.is_answered):
            self.trips.execute((), carries=True)


def _has_more(thread: Any) -> bool:
    """Whether a message waits for the worker threads, of which this is one that goes on."""
    # Not by empty(), which takes the lock that all of them wait for.
    return getattr(thread, "running", False) and not thread.paused and bool(thread.work_queue.queue)
