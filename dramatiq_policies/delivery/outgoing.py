"""Messages to publish before a delivery is acknowledged."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from dramatiq import Message
    from dramatiq.broker import Broker

__all__ = ["FollowUp", "OutgoingMessage", "Recorder"]


class OutgoingMessage:
    """A message to be accepted by the broker before the acknowledgement of the delivery."""

    __slots__ = ("delay", "encoded", "message")

    def __init__(self, message: Message[Any], delay: int | None = None) -> None:
        self.message = message
        self.delay = delay
        #: The encoded form, chosen by the transport. Encoded once: a repeated publish sends the same bytes.
        self.encoded: Any = None


#: A message to publish before the acknowledgement, or a call that returns such messages.
FollowUp: TypeAlias = OutgoingMessage | Callable[[], list[OutgoingMessage]]


class Recorder:
    """Replaces the broker where Dramatiq's own code enqueues in an after-hook, and records the messages."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.sends: list[OutgoingMessage] = []

    def enqueue(self, message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        self.sends.append(OutgoingMessage(message, delay))
        return message

    def __getattr__(self, name: str) -> Any:
        return getattr(self.broker, name)
