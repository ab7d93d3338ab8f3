"""Publish many messages at once: `Batch` for any broker. Each broker's package has a subclass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dramatiq import Message
from dramatiq.common import dq_name
from dramatiq.errors import BrokerConnectionError, ConnectionClosed

from ..common.clock import now_ms
from ..delivery.direct import enqueue_directly

if TYPE_CHECKING:
    from dramatiq.broker import Broker

    from ..delivery.broker_state import BrokerState

__all__ = ["Batch", "Encoded", "KnownBatch", "prepared"]


def prepared(broker: Broker, message: Message[Any], delay: int | None, **options: Any) -> Message[Any]:
    """Return a message as the ``enqueue`` of a known broker publishes it. Runs the before-hooks of enqueue.

    Parameters:
      options: The broker's additional options of the message.
    """
    if delay is not None:
        options["eta"] = now_ms() + delay
        message = message.copy(queue_name=dq_name(message.queue_name), options=options)
    elif options:
        message = message.copy(options=options)
    broker.emit_before("enqueue", message, delay)
    return message


class Encoded(NamedTuple):
    """A prepared message, and its encoded form for the broker."""

    message: Message[Any]
    body: bytes


class Batch:
    """Prepares messages as the broker's ``enqueue`` does, and publishes them later, many at once.

    With a broker of an unknown type, ``before_enqueue`` hooks run at the publication.
    """

    #: Whether `publish` waits for answers, and takes a ``meanwhile`` to call in that time.
    overlaps = False
    #: The option with the broker's own id of a message; None for a broker without such ids.
    id_option: str | None = None

    def __init__(self, state: BrokerState) -> None:
        self.state = state
        self.broker: Any = state.broker

    def prepare(self, message: Message[Any], delay: int | None) -> Message[Any]:
        """Return the final message: with its queue, its due time and the options of the broker. Runs ``before_enqueue``."""
        return message if delay is None else message.copy(options={"eta": now_ms() + delay})

    def publish(
        self, messages: Sequence[Encoded], meanwhile: Callable[[], object] | None = None
    ) -> list[Exception | None]:
        """Publish messages in order. Returns for each message None or the broker's error.

        ``ConnectionClosed`` means an unreachable broker, or a broker that accepts nothing at present.
        """
        results: list[Exception | None] = []
        for message, _ in messages:
            eta = message.options.get("eta")
            try:
                enqueue_directly(self.broker, message, None if eta is None else max(0, eta - now_ms()))
                results.append(None)
            except (BrokerConnectionError, OSError) as error:
                lost: Exception = ConnectionClosed(error)
                return [*results, *[lost] * (len(messages) - len(results))]
            except Exception as error:
                results.append(error)
        return results

    def emit_after_enqueue(self, message: Message[Any], delay: int | None) -> None:
        """Run the ``after_enqueue`` hooks of an accepted message."""

    def serve(self) -> None:
        """Keep the idle connections of this thread alive."""

    def close(self) -> None:
        """Close the connections of this thread."""


class KnownBatch(Batch):
    """A batch of a broker with a known ``enqueue``."""

    def prepare(self, message: Message[Any], delay: int | None) -> Message[Any]:
        return prepared(self.broker, message, delay, **self.options_of(message))

    def options_of(self, message: Message[Any]) -> dict[str, Any]:
        """Return the broker's additional options of a message.

        Raises:
          QueueNotFound: The broker has no such queue.
        """
        return {}

    def emit_after_enqueue(self, message: Message[Any], delay: int | None) -> None:
        self.broker.emit_after("enqueue", message, delay)
