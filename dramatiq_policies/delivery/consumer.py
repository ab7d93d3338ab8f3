"""The consumer that a worker calls in the place of Dramatiq's own.

Each message of a work queue gets a `Delivery`. `settlement` settles a message; then the transport that delivered the
message acknowledges. A delayed message is first published to the work queue and then acknowledged.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dramatiq import Message
from dramatiq.broker import Consumer, MessageProxy
from dramatiq.errors import ActorNotFound

from .. import _dramatiq
from ..errors import MalformedMessage
from ..outcomes import Outcome
from .decision import Decision
from .delivery import Delivery
from .moving_delayed import move_due
from .returned import RETURNED, decision_of_returned
from .settlement import settle_and_ack
from .validation import check_composition, clean_options, is_number, without_stack

if TYPE_CHECKING:
    from dramatiq import Worker

    from .transport import Transport

__all__ = ["PolicyConsumer", "quiet"]

#: The option of a message that another worker may have begun. The consumer moves the option to `Delivery.redelivered`.
REDELIVERED = "redelivered"
#: Types of arguments that a job can't change in place.
_FIXED = frozenset({type(None), bool, int, float, str, bytes})


class PolicyConsumer(Consumer):
    """The worker's side of a consumer.

    Parameters:
      transport: The broker's side.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.state = transport.state
        self.broker = transport.broker
        #: Messages that arrived while the worker shut down, requeued when the consumer closes.
        self.set_aside: list[MessageProxy] = []

    def __next__(self) -> MessageProxy | None:
        transport = self.transport
        last_polled_at = self.state.last_polled_at
        if last_polled_at is not None:
            last_polled_at[transport.source] = time.monotonic()
        if transport.parked.waiting:
            transport.parked.return_due()
        if transport.delayed.queue and not transport.has_received() and move_due(transport):
            # More are due: do not wait for a message first.
            return None
        message = transport.take()
        if message is None:
            return None
        if transport.is_delay_queue:
            # Dramatiq would run a delayed message without a due time from here, under the name of the delay queue.
            if not is_number(message.options.get("eta")):
                message.options["eta"] = 0
            return message
        if transport.is_quiet:
            self.set_aside.append(message)
            return None
        return self._deliver(message)

    def _deliver(self, message: MessageProxy) -> MessageProxy | None:
        """Make the delivery of a message. Returns None if the message is settled at once, without a run."""
        plain = _dramatiq.message_of(message)
        message.delivery = delivery = Delivery(self.transport, plain)  # type: ignore[attr-defined]
        options = plain.options
        clean_options(plain)
        received: Any = message  # With the attributes of `Transport.take`.
        delivery.body = received.body or _body_of(plain)
        if options.pop(REDELIVERED, None) is not None or received.redelivered:
            delivery.redelivered = True
            delivery.earlier_run = received.earlier_run
        if RETURNED in options and (decision := decision_of_returned(options)) is not None:
            self._settle_without_run(message, delivery, decision)
            return None
        if "pipe_target" in options or "group_completion_callbacks" in options:
            try:
                check_composition(options)
            except MalformedMessage as error:
                error = without_stack(error)
                decision = Decision(Outcome.DEAD, "malformed", exception=error, dead_letter=True)
                self._settle_without_run(message, delivery, decision)
                return None
        return message

    def ack(self, message: MessageProxy) -> None:
        delivery: Delivery | None = getattr(message, "delivery", None)
        if delivery is None:
            self.transport.ack(message)
        else:
            self._settle_now_or_later(message, delivery)

    def nack(self, message: MessageProxy) -> None:
        """Settle a failed message as a dead letter."""
        delivery: Delivery | None = getattr(message, "delivery", None)
        if delivery is None:
            self.transport.nack(message)
            return
        decision = delivery.decision
        if not delivery.settled and (decision is None or not decision.dead_letter):
            delivery.decision = _failed_elsewhere(message)
        self._settle_now_or_later(message, delivery)

    def _settle_now_or_later(self, message: MessageProxy, delivery: Delivery) -> None:
        """Settle a delivery now, or leave a plain success to the claim of the next job."""
        state = self.state
        batched_completions = state.idempotency.batched_completions
        if batched_completions is None:
            settle_and_ack(state, message, delivery)
            return
        if not batched_completions.post(message, delivery):
            settle_and_ack(state, message, delivery)
        batched_completions.flush_if_idle()

    def _settle_without_run(self, message: MessageProxy, delivery: Delivery, decision: Decision) -> None:
        delivery.decision = decision
        message.fail()
        self._settle_now_or_later(message, delivery)

    @property
    def outstanding_message_count(self) -> int:
        """How many messages are in hand. Dramatiq's consumer on Redis has an attribute of this name."""
        return self.transport.outstanding_message_count

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        self.transport.try_requeue(list(messages))

    def close(self) -> None:
        transport = self.transport
        if self.state.stopping.is_set():
            transport.parked.return_due(everything=True)
            unrun, self.set_aside = self.set_aside, []
            while (item := transport.delayed.take()) is not None:
                unrun.append(_dramatiq.delayed_message(item))
                transport.delayed.task_done()
            transport.try_requeue(unrun)
        transport.close()


def _failed_elsewhere(message: MessageProxy) -> Decision:
    """Decide on a message failed by Dramatiq (an unknown actor) or by a middleware of the user."""
    error = _dramatiq.exception_of(message)
    if isinstance(error, ActorNotFound):
        return Decision(Outcome.DEAD, "unknown_actor", exception=error, dead_letter=True)
    return Decision(Outcome.SKIPPED, exception=error, dead_letter=True)


def _body_of(message: Message[Any]) -> bytes | None:
    """Encode a message if the broker hides the body and a job could change the arguments in place."""
    if all(type(value) in _FIXED for value in (*message.args, *message.kwargs.values())):
        return None
    try:
        return message.encode()
    except Exception:
        return None


def quiet(worker: Worker) -> None:
    """Begin no further job on a worker in shutdown. The consumers set messages aside and requeue them at the end.

    Consumers run on while jobs end. Otherwise an idle thread could take a message just interrupted by the shutdown and
    requeued, and nothing would interrupt the second run. Nor may the thread of an interrupted job begin the next message in
    hand: Dramatiq stops the threads only after the hooks of all middleware, so they are paused now.
    """
    for worker_thread in worker.workers:
        worker_thread.pause()
    for thread in worker.consumers.values():
        if isinstance(thread.consumer, PolicyConsumer):
            thread.consumer.transport.is_quiet = True
