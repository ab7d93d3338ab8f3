"""The transport on a StubBroker, and the error about unencodable arguments."""

from __future__ import annotations

import inspect
from functools import partial, wraps
from typing import Any

from dramatiq import Message
from dramatiq.broker import Broker, MessageProxy
from dramatiq.brokers.stub import StubBroker
from dramatiq.errors import DramatiqError
from dramatiq.message import get_encoder

from ... import _dramatiq
from ...delivery.broker_state import BrokerState
from ...delivery.delay_queue import Move
from ...delivery.delivery import Delivery
from ...delivery.direct import enqueue_directly
from ...delivery.transport import Transport
from ...errors import MalformedMessage

__all__ = ["StubTransport", "explain_unserialisable"]


class StubTransport(Transport):
    """Requeues fetched messages without a run, for the next worker."""

    broker: StubBroker

    def __init__(self, state: BrokerState, inner: Any, queue_name: str, prefetch: int) -> None:
        super().__init__(state, inner, queue_name, prefetch)
        if self.is_delay_queue:
            # All delayed messages are in memory: later messages must not occupy the slots of nearer messages.
            _dramatiq.lift_stub_limit(inner)

    def take(self) -> MessageProxy | None:
        data = _dramatiq.next_stub_body(self.inner)
        if data is None:
            return None
        try:
            message = self.decode(data)
        except Exception as error:
            dead_letter = _dramatiq.StubMessage(self._raw(data))
            unreadable = MalformedMessage(f"the body is unreadable: {error}")
            dead_letter.stuff_exception(unreadable)
            self.broker.dead_letters_by_queue[self.queue_name].append(dead_letter)
            self.report_malformed(unreadable)
            _dramatiq.release_stub_slot(self.inner)
            return None
        proxy = _dramatiq.StubMessage(message)
        # The body as received: for a requeue, and for the redelivery after a crash in the test kit.
        _dramatiq.cache_fields(proxy, message, data)
        return proxy

    def dead_letter(self, message: MessageProxy, dead: Message[Any] | bytes) -> None:
        if isinstance(dead, bytes):
            dead = self._raw(dead)
        else:
            self.encoded(dead)  # Raises, as on a server, if the dead letter can't be encoded.
        dead_letters = self.broker.dead_letters_by_queue
        dead_letters[self.queue_name].append(_dramatiq.StubDeadLetter(dead, message))

    def _raw(self, body: bytes) -> Message[Any]:
        return Message(self.queue_name, "?", (), {}, {"raw": body.decode(errors="replace")})

    def publish_follow_ups(self, message: MessageProxy, delivery: Delivery, dead: Message[Any] | bytes | None) -> None:
        if self.state.stopping.is_set():
            # A thread of the stopping worker would take the message.
            self.state.requeue_after_shutdown += [
                partial(enqueue_directly, self.broker, one.message, one.delay) for one in delivery.outgoing
            ]
            delivery.outgoing.clear()
        super().publish_follow_ups(message, delivery, dead)
        # After `join` a test expects the published outcome: acknowledge last.
        delivery.acked = False

    def ack(self, message: MessageProxy) -> None:
        _dramatiq.release_stub_slot(self.inner)

    def requeue(self, messages: list[MessageProxy]) -> None:
        for message in messages:
            self.inner.queue.put(message.body)
            _dramatiq.release_stub_slot(self.inner)

    def abandon(self, message: MessageProxy) -> None:
        self.state.requeue_after_shutdown.append(partial(self.requeue, [message]))

    def move_one(self, move: Move) -> None:
        enqueue_directly(self.broker, move.moved)
        self.ack(move.message)


def explain_unserialisable(broker: Broker) -> None:
    """Name the unencodable argument in a StubBroker's errors."""
    stock = broker.enqueue

    @wraps(stock)
    def enqueue(message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        try:
            return stock(message, delay=delay)
        except DramatiqError:
            raise  # Not about the message's values.
        except Exception as error:
            _explain(broker, message, error)
            raise

    broker.enqueue = enqueue  # type: ignore[method-assign]


def _explain(broker: Broker, message: Message[Any], error: Exception) -> None:
    """Raise an error with the name of the unencodable argument.

    Raises:
      TypeError: An argument can't be encoded.
    """
    for name, value in _named(broker, message):
        try:
            get_encoder().encode({"value": value})
        except Exception as reason:
            raise TypeError(
                f"The argument {name!r} of a message for actor {message.actor_name!r} can't be encoded: "
                f"{reason}. The argument is a {type(value).__name__}: {value!r:.200}. Send ids and plain "
                "values."
            ) from error


def _named(broker: Broker, message: Message[Any]) -> list[tuple[str, Any]]:
    """Return a message's options, and its arguments under the names of the actor's parameters."""
    options = [(f"{name} (an option)", value) for name, value in message.options.items()]
    numbered = [(str(number), value) for number, value in enumerate(message.args)]
    named = [*message.kwargs.items()]
    actor = broker.actors.get(message.actor_name)
    if actor is not None:
        try:
            bound = inspect.signature(actor.fn).bind(*message.args, **message.kwargs)
        except (TypeError, ValueError):
            pass
        else:
            numbered, named = [], [*bound.arguments.items()]
    return [*numbered, *named, *options]
