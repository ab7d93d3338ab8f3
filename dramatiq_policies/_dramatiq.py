"""All private names of Dramatiq used by dramatiq_policies, except those of the kit's worker (`testing.inline_worker`).

Tested with Dramatiq 2.1 and 2.2. If a new release of Dramatiq breaks dramatiq_policies, the break is here.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from queue import Empty
from typing import Any, Literal, TypeAlias, cast

from dramatiq import Message
from dramatiq import worker as _worker
from dramatiq.broker import Broker, Consumer, MessageProxy
from dramatiq.brokers import stub as _stub
from dramatiq.middleware import Middleware
from dramatiq.results import Results

#: The logger of worker threads, and the lines for failed and skipped messages.
WORKER_LOGGER = "dramatiq.worker.WorkerThread"
OTHER_LOGGERS = ("dramatiq.worker.Worker", "dramatiq.worker._WorkerMiddleware")
FAILED_LINE = "Failed to process message %s with unhandled exception."
EXPECTED_LINE = "Failed to process message %s with expected exception %s."
SKIPPED_LINE = "Message %s was skipped."
#: A line of the consumer thread, on a logger with the name of the queue.
UNKNOWN_ACTOR_LINE = "Received message for undefined actor %r. Moving it to the DLQ."

StubMessage: type[MessageProxy] = _stub._StubMessageProxy


class StubDeadLetter(_stub._StubMessageProxy):
    """A dead letter of a StubBroker, with the failure. Equals the original message."""

    def __init__(self, message: Message[Any], origin: MessageProxy) -> None:
        self._origin = origin
        super().__init__(message)
        self.failed = True

    # The worker clears the error of the original message, not of the copy.
    @property
    def _exception(self) -> BaseException | None:
        return self._origin._exception

    @_exception.setter
    def _exception(self, exception: BaseException | None) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) or self._origin == other

    __hash__ = None  # type: ignore[assignment]


def message_of(proxy: MessageProxy) -> Message[Any]:
    """Return the message of a proxy."""
    return proxy._message


def cache_fields(proxy: Any, message: Message[Any], body: bytes | None) -> None:
    """Copy the fields of the message to Dramatiq's proxy, with the attributes for `Transport.take`.

    Without the copy, each read of a field first fails on the proxy and then asks the message: 16 times per message, a quarter of
    Dramatiq's whole cost. The fields never change, because a message is frozen. Not by vars(): before CPython 3.13 that makes a
    dict of each object, and each later read slower.
    """
    proxy.queue_name = message.queue_name
    proxy.actor_name = message.actor_name
    proxy.args = message.args
    proxy.kwargs = message.kwargs
    proxy.options = message.options
    proxy.message_id = message.message_id
    proxy.message_timestamp = message.message_timestamp
    proxy.body = body
    proxy.redelivered = False
    proxy.earlier_run = None


def cache_missing_fields(proxy: MessageProxy, message: Message[Any]) -> None:
    """Do the same for the proxy of an unknown broker, which may have attributes of these names."""
    own = vars(proxy)
    own.update({**vars(message), "body": None, "redelivered": False, "earlier_run": None, **own})


def exception_of(proxy: MessageProxy) -> BaseException | None:
    """Return the exception set by the worker."""
    return proxy._exception


def forget_exception(proxy: MessageProxy) -> None:
    """Drop the exception set by the worker, and the frames in its traceback. The StubBroker keeps it otherwise."""
    proxy._exception = None


def is_stub_consumer(consumer: Consumer) -> bool:
    return type(consumer) is _stub._StubConsumer


def release_stub_slot(consumer: Any) -> None:
    """Finish one message of a stub consumer and free a prefetch slot."""
    consumer.queue.task_done()
    if hasattr(consumer, "prefetch_semaphore"):  # Not before Dramatiq 2.2.
        consumer.prefetch_semaphore.release()


def next_stub_body(consumer: Any) -> bytes | None:
    """Take a prefetch slot and the next body of a stub consumer. None after the timeout."""
    slots = getattr(consumer, "prefetch_semaphore", None)
    seconds = consumer.timeout / 1_000
    if slots is not None and not slots.acquire(timeout=seconds):
        return None
    try:
        return cast("bytes", consumer.queue.get(timeout=seconds))
    except Empty:
        if slots is not None:
            slots.release()
        return None


#: An item of a delay queue: (due time, message) before Dramatiq 2.2, and then an object of a private class.
DelayItem: TypeAlias = Any


def eta_of(item: DelayItem) -> float:
    """Return the due time of an item of a delay queue. Before Dramatiq 2.2 an item is a tuple."""
    return cast("float", item[0] if isinstance(item, tuple) else item.priority)


def delayed_message(item: DelayItem) -> MessageProxy:
    return cast("MessageProxy", item[1] if isinstance(item, tuple) else item.message)


def delay_item(eta: float, message: MessageProxy) -> DelayItem:
    """Make an item for the delay queue of a consumer thread."""
    made = getattr(_worker, "_WorkQueueItem", None)
    return (eta, message) if made is None else made(eta, message)


def delayed_until(item: DelayItem, eta: int) -> DelayItem:
    """Return a copy of the item with another due time."""
    return (eta, item[1]) if isinstance(item, tuple) else type(item)(eta, item.message)


def is_redis_consumer(consumer: Consumer) -> bool:
    try:
        from dramatiq.brokers.redis import _RedisConsumer
    except ImportError:
        return False
    return type(consumer) is _RedisConsumer


def is_rabbitmq_consumer(consumer: Consumer) -> bool:
    try:
        from dramatiq.brokers.rabbitmq import _RabbitmqConsumer
    except ImportError:
        return False
    return type(consumer) is _RabbitmqConsumer


def rabbitmq_deliveries(consumer: Any) -> Iterator[tuple[Any, Any, bytes | None]]:
    return cast("Iterator[tuple[Any, Any, bytes | None]]", consumer.iterator)


def rabbitmq_message(consumer: Any, method: Any, message: Message[Any], body: bytes) -> MessageProxy:
    """Make Dramatiq's proxy of a delivered message, with the attributes for `Transport.take`."""
    from dramatiq.brokers.rabbitmq import _RabbitmqMessage

    consumer.known_tags.add(method.delivery_tag)
    proxy = _RabbitmqMessage(method.redelivered, method.delivery_tag, message)
    cache_fields(proxy, message, body)
    proxy.redelivered = method.redelivered
    return proxy


def rabbitmq_parameters(broker: Any) -> list[Any]:
    """Return the connection parameters of a RabbitmqBroker, one for each server. Dramatiq keeps a single server's without a list."""
    given = broker.parameters
    return list(given) if isinstance(given, (list, tuple)) else [given]


def take_rabbitmq_tag(consumer: Any, message: Any) -> int | None:
    """Remove and return the delivery tag of a message. None if already removed."""
    try:
        consumer.known_tags.remove(message._tag)
    except KeyError:
        return None
    return cast("int", message._tag)


def rabbitmq_acks(consumer: Any) -> tuple[Callable[[int], object], Callable[[int], object]]:
    """Return two functions to acknowledge a delivery tag: the first buffers, the second also flushes the buffer.

    The buffered function is pika's inner one. Without buffering, each message would cost four system calls.
    """
    channel = consumer.channel
    return getattr(channel, "_impl", channel).basic_ack, channel.basic_ack


def rabbitmq_confirmed(channel: Any, confirmed: Callable[[Any], None], returned: Callable[..., None]) -> Any:
    """Return the inner channel of a blocking pika channel, with confirms by callback. Its ``basic_publish`` never waits."""
    inner = channel._impl
    inner.add_on_return_callback(returned)
    inner.confirm_delivery(confirmed)
    return inner


def take_rabbitmq_connection(broker: Any) -> Any:
    """Remove and return the connection of a RabbitmqBroker for this thread, or None.

    ``del broker.connection`` would close the connection, which fails after an interrupt in the middle of an operation.
    """
    connection = getattr(broker.state, "connection", None)
    for name in ("channel", "connection"):
        if hasattr(broker.state, name):
            delattr(broker.state, name)
    broker.connections.discard(connection)
    broker.channels.difference_update([one for one in broker.channels.copy() if one.connection is connection])
    return connection


def leave_rabbitmq_connections(broker: Any) -> object:
    """Make a RabbitmqBroker forget all connections without closing. Returns the old connections."""
    left = (broker.state, broker.connections, broker.channels)
    broker.state, broker.connections, broker.channels = threading.local(), set(), set()
    return left


def rabbitmq_queue_arguments(broker: Any, queue_name: str) -> dict[str, Any]:
    """Return the arguments for the declaration of a queue and its delay queue."""
    return cast("dict[str, Any]", broker._build_queue_arguments(queue_name))


def add_options(broker: Broker, middleware: Middleware) -> None:
    """Allow the actor options of a middleware added without ``add_middleware``."""
    broker.actor_options |= middleware.actor_options


def results_options(results: Results, broker: Broker, message: Message[Any]) -> tuple[bool, int]:
    """Return whether the result of a message is stored, and for how many milliseconds."""
    return cast("tuple[bool, int]", results._lookup_options(broker, message))


def clock_places() -> list[tuple[Any, str]]:
    """Return the modules that read the clock for a StubBroker, each with the name ``time``.

    In `dramatiq.common` the name is the function, elsewhere the module.
    """
    from dramatiq import common, message
    from dramatiq.middleware import retries
    from dramatiq.rate_limits import bucket, window
    from dramatiq.rate_limits.backends import stub as limits
    from dramatiq.results.backends import stub as results

    return [(module, "time") for module in (common, message, retries, bucket, window, limits, results)]


def worker_behind(middleware: Middleware) -> _worker.Worker | None:
    """Return the worker of a ``_WorkerMiddleware``, which stays on the broker for ever. None for other middleware."""
    return middleware.worker if isinstance(middleware, _worker._WorkerMiddleware) else None


class _NoLimit:
    """Replaces the prefetch semaphore of a stub consumer: no limit."""

    def acquire(self, timeout: float | None = None) -> bool:
        return True

    def release(self) -> None:
        pass


def lift_stub_limit(consumer: object) -> None:
    """Remove the prefetch limit of a stub consumer, as before Dramatiq 2.2."""
    if hasattr(consumer, "prefetch_semaphore"):
        consumer.prefetch_semaphore = _NoLimit()


Kind = Literal["stub", "redis", "rabbitmq"]

_CLASSES: dict[Kind, str] = {"stub": "StubBroker", "redis": "RedisBroker", "rabbitmq": "RabbitmqBroker"}


def kind_of(broker: Broker) -> Kind | None:
    """Return ``"stub"``, ``"redis"`` or ``"rabbitmq"``, also for subclasses. None for any other broker."""
    for kind, name in _CLASSES.items():
        # A broker of this kind has imported the module already. Importing here would load unused clients.
        module = sys.modules.get(f"dramatiq.brokers.{kind}")
        if module is not None and isinstance(broker, getattr(module, name)):
            return kind
    return None


def is_missing_middleware(error: BaseException) -> bool:
    """Whether Dramatiq raised ``error`` because the broker has no GroupCallbacks or no Results: no retry can succeed."""
    if type(error) is not RuntimeError:
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__") in ("dramatiq.broker", "dramatiq.composition")
