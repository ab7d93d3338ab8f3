"""Browse and move messages on RabbitMQ over AMQP.

The browser gets messages one by one and holds the messages unacknowledged. When the channel closes, RabbitMQ requeues
unacknowledged messages at their place. A move publishes the message (mandatory, confirmed) before the ack.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import pika
import pika.exceptions
from dramatiq import Message
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.common import xq_name

from ... import _dramatiq
from ...common.connections import discard, is_async_exception
from ...errors import OperationError
from ..browser import Item

__all__ = ["browse", "connect", "unreachable"]

#: After how many seconds without a message the queue counts as empty.
_SILENCE = 1.0


@contextmanager
def connect(broker: RabbitmqBroker) -> Iterator[Any]:
    """Open a separate connection to the server of the broker.

    Raises:
      OperationError: The server can't be reached, or closes the connection or a channel.
    """
    try:
        connection = pika.BlockingConnection(broker.parameters)
    except (pika.exceptions.AMQPError, OSError) as error:
        raise unreachable(broker, error) from None
    end = _close
    try:
        yield connection
    except (pika.exceptions.AMQPError, OSError) as error:
        raise OperationError(
            f"RabbitMQ closed the connection ({_reason(error)}). No message is lost; run the command again."
        ) from None
    except BaseException as error:
        if is_async_exception(error):
            end = discard
        raise
    finally:
        end(connection)


def _close(connection: Any) -> None:
    with suppress(pika.exceptions.AMQPError, OSError):
        connection.close()


def unreachable(broker: RabbitmqBroker, error: BaseException | None) -> OperationError:
    """Return the error for an unreachable server, with the reason."""
    first = _dramatiq.rabbitmq_parameters(broker)[0]
    return OperationError(f"RabbitMQ can't be reached at {first.host}:{first.port} ({_reason(error)}).")


def _reason(error: Any) -> str:
    """Return the text of a pika error. Outer errors have no text, only inner errors."""
    inner = getattr(error, "exception", None) or next(iter([*getattr(error, "exceptions", ()), *error.args][-1:]), None)
    if isinstance(inner, BaseException):
        return _reason(inner)
    text = getattr(error, "reply_text", "") or " ".join(str(part) for part in error.args)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def browse(broker: RabbitmqBroker, queue: str, *, dead: bool) -> Iterator[RabbitmqBrowser]:
    """Open the dead letters of a queue, or its ready messages."""
    with connect(broker) as connection:
        yield RabbitmqBrowser(broker, connection, xq_name(queue) if dead else queue)


class RabbitmqBrowser:
    """The messages of one queue."""

    def __init__(self, broker: RabbitmqBroker, connection: Any, name: str) -> None:
        self.broker = broker
        self.connection = connection
        self.name = name
        self.channel = connection.channel()
        self.size = 0
        try:
            self.size = self.channel.queue_declare(name, passive=True).method.message_count
        except pika.exceptions.ChannelClosedByBroker as error:
            if error.reply_code != 404:
                raise
        self._out: Any = None

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Item]:
        for _ in range(self.size):
            method, _properties, body = self.channel.basic_get(self.name)
            if method is None:
                return
            yield Item(body, None, method.delivery_tag)

    def read_all(self) -> Iterator[Item]:
        """Iterate several times as fast: RabbitMQ pushes all messages."""
        arriving = self.channel.consume(self.name, inactivity_timeout=_SILENCE)
        for method, _properties, body in islice(arriving, self.size):
            if method is None:
                # Workers hold the other messages.
                return
            yield Item(body, None, method.delivery_tag)

    def send(self, item: Item, message: Message[Any]) -> bool:
        self.broker.emit_before("enqueue", message, None)
        properties = pika.BasicProperties(delivery_mode=2, priority=message.options.get("broker_priority"))
        try:
            self._confirmed().basic_publish("", message.queue_name, message.encode(), properties, mandatory=True)
        except pika.exceptions.UnroutableError:
            raise OperationError(
                f"RabbitMQ has no queue {message.queue_name!r}. Start a worker once: it declares the queue."
            ) from None
        self.broker.emit_after("enqueue", message, None)
        return self.drop(item)

    def _confirmed(self) -> Any:
        if self._out is None:
            self._out = self.connection.channel()
            self._out.confirm_delivery()
        return self._out

    def drop(self, item: Item) -> bool:
        self.channel.basic_ack(item.place)
        return True

    def wait(self, seconds: float) -> None:
        self.connection.sleep(seconds)
