"""Send the completion of a job together with the claim of the next job: one round trip per job instead of two.

TCP calls this piggybacking (RFC 1122, 4.2.3.2: an acknowledgement waits briefly for outgoing data). After a job, the worker
thread defers the command that completes the key (and also acks the message, if the broker's Redis is the store), and takes
the next message. Four rules keep every guarantee:

- A thread begins no job before the completion of its last job is stored. Each call that begins a job sends the deferred
  commands first and waits for their replies.
- No command stays deferred while threads are idle. After deferring a command, and after every ack, a thread checks the work
  queue. If the queue is empty, the thread flushes. Otherwise the thread that takes the next message begins the job, which
  flushes, or acks the message and checks again.
- No user code runs between the job and its completion, and none runs on another job's thread. So only plain successes are
  deferred, only while no user code listens to successes and no foreign middleware has a hook before a job or after an ack.
- On an error or an unexpected reply, the thread that got the reply settles the message in the ordinary way.
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

__all__ = ["BatchedCompletions"]

logger = SafeLogger("dramatiq_policies.outcomes")

#: Hooks that may delay a thread between two jobs, or rely on a confirmed ack.
_HOOKS = ("before_process_message", "after_ack")
#: Packages with hooks that do neither.
_HARMLESS = ("dramatiq", "dramatiq_policies", "sentry_sdk")
#: Seconds before a thread tries again to ack another thread's message. As in Dramatiq.
_ACK_AGAIN_AFTER = 5.0


class BatchedCompletions:
    """The deferred completions of one broker's worker threads.

    Parameters:
      state: The state of the broker.
      batcher: The command batcher of the store.
    """

    def __init__(self, state: BrokerState, batcher: CommandBatcher) -> None:
        self.state = state
        self.batcher = batcher
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        """Start without deferred completions."""
        self._last = threading.local()

    @staticmethod
    def is_safe(state: BrokerState) -> bool:
        """Return whether no foreign hook runs between the end of a job and the begin of the next job."""
        return not any(
            getattr(type(middleware), hook) is not getattr(Middleware, hook)
            and type(middleware).__module__.partition(".")[0] not in _HARMLESS
            for middleware in state.broker.middleware
            for hook in _HOOKS
        )

    def post(self, message: MessageProxy, delivery: Delivery) -> bool:
        """Defer the completion of a plain success, if another message waits for a worker thread.

        Returns:
          False if the caller must settle the message in the ordinary way.
        """
        if not delivery.completes_key() or not delivery.is_plain_success() or self.state.outcomes.successes_observed:
            return False
        if not _has_more(threading.current_thread()):
            return False
        transport = delivery.transport
        command, acks = transport.completion_command(delivery)

        def on_reply(answer: object) -> None:
            if not isinstance(answer, Exception) and answer:
                self.state.idempotency.claims.drop(delivery.claim)
                delivery.claim = None
                if acks:
                    transport.acked_by_completion(delivery, answer)
            self._settle(message, delivery)

        self._last.post = post = DeferredCommand(command, on_reply)
        self.batcher.post(post)
        return True

    def _settle(self, message: MessageProxy, delivery: Delivery) -> None:
        while True:
            try:
                settle_and_ack(self.state, message, delivery)
                return
            except BrokerConnectionError as error:
                logger.warning(
                    "Message %s can't be acknowledged yet (%s). The worker tries again.", message.message_id, error
                )
                self.state.stopping.wait(_ACK_AGAIN_AFTER)
            except Exception:
                logger.exception("Message %s could not be acknowledged and will be redelivered.", message.message_id)
                return

    def flush_if_idle(self) -> None:
        """After an ack, flush if the work queue is empty: no other thread would send the deferred commands."""
        if self.batcher.posted and not _has_more(threading.current_thread()):
            self.flush()

    def flush(self) -> None:
        """Send the deferred commands, and wait for the replies to this thread's own."""
        last: DeferredCommand | None = getattr(self._last, "post", None)
        if self.batcher.posted or not (last is None or last.is_answered):
            self.batcher.execute((), carries=True)


def _has_more(thread: Any) -> bool:
    """Return whether a message waits in the work queue, and this worker thread keeps running."""
    # Not by empty(): all worker threads wait for the queue's lock.
    return getattr(thread, "running", False) and not thread.paused and bool(thread.work_queue.queue)
