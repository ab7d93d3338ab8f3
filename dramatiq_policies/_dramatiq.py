"""Every private name of Dramatiq that this library touches, in one place.

Checked against Dramatiq 2.1 and 2.2. When a new release of Dramatiq breaks us, it breaks here.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from queue import Empty, PriorityQueue
from typing import Any, Literal, cast

from dramatiq import Message
from dramatiq import worker as _worker
from dramatiq.broker import Broker, Consumer, MessageProxy
from dramatiq.brokers import stub as _stub
from dramatiq.middleware import Middleware

#: The logger on which a worker thread reports failed and skipped messages, and the lines in question.
WORKER_LOGGER = "dramatiq.worker.WorkerThread"
OTHER_LOGGERS = ("dramatiq.worker.Worker", "dramatiq.worker._WorkerMiddleware")
FAILED_LINE = "Failed to process message %s with unhandled exception."
EXPECTED_LINE = "Failed to process message %s with expected exception %s."
SKIPPED_LINE = "Message %s was skipped."
#: What a consumer's thread reports, on a logger that ends in its queue's name.
UNKNOWN_ACTOR_LINE = "Received message for undefined actor %r. Moving it to the DLQ."

StubMessage: type[MessageProxy] = _stub._StubMessageProxy


class StubDeadLetter(_stub._StubMessageProxy):
    """A dead letter of a StubBroker: says why it is one, and yet equals the message that it was."""

    def __init__(self, message: Message[Any], origin: MessageProxy) -> None:
        self._origin = origin
        super().__init__(message)
        self.failed = True

    # The worker clears the error of the message that it processed, not of a copy.
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
    """The message behind a proxy."""
    return proxy._message


def keep_fields(proxy: MessageProxy, message: Message[Any]) -> None:
    """Have a proxy keep the fields of its message, where it has none of its own.

    Otherwise each look at one fails first and then asks the message: sixteen times on a message's way, which is a quarter
    of what Dramatiq takes for all of it. They are never set again, for a message is frozen.
    """
    own = vars(proxy)
    own.update({**vars(message), **own})


def exception_of(proxy: MessageProxy) -> BaseException | None:
    """What the worker stuffed into the proxy."""
    return proxy._exception


def is_stub_consumer(consumer: Consumer) -> bool:
    return type(consumer) is _stub._StubConsumer


def release_stub_slot(consumer: Any) -> None:
    """What a stub consumer does at every ack: the queue counts one less, and a prefetch slot is free."""
    consumer.queue.task_done()
    if hasattr(consumer, "prefetch_semaphore"):  # Not before Dramatiq 2.2.
        consumer.prefetch_semaphore.release()


def next_stub_body(consumer: Any) -> bytes | None:
    """The next body of a stub consumer, one of its prefetch slots taken; None if there was none for a while."""
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


def eta_of(item: Any) -> float:
    """When an item of a consumer thread's delay queue is due; before Dramatiq 2.2 it is a tuple."""
    return cast("float", item[0] if isinstance(item, tuple) else item.priority)


def delayed_message(item: Any) -> MessageProxy:
    return cast("MessageProxy", item[1] if isinstance(item, tuple) else item.message)


def delay_item(eta: float, message: MessageProxy) -> Any:
    """What a consumer thread puts into its delay queue."""
    made = getattr(_worker, "_WorkQueueItem", None)
    return (eta, message) if made is None else made(eta, message)


def delayed_until(item: Any, eta: int) -> Any:
    """The same message, due at another time."""
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


def rabbitmq_message(consumer: Any, method: Any, message: Message[Any]) -> MessageProxy:
    from dramatiq.brokers.rabbitmq import _RabbitmqMessage

    consumer.known_tags.add(method.delivery_tag)
    return _RabbitmqMessage(method.redelivered, method.delivery_tag, message)


def take_rabbitmq_tag(consumer: Any, message: Any) -> int | None:
    """The tag by which a RabbitMQ consumer acks a message, to be used once; None if it was."""
    try:
        consumer.known_tags.remove(message._tag)
    except KeyError:
        return None
    return cast("int", message._tag)


def rabbitmq_acks(consumer: Any) -> tuple[Callable[[int], object], Callable[[int], object]]:
    """How a consumer's channel acks: one that leaves what it writes in the connection's buffer, and one that sends it all.

    The first is pika's own inside of the second; without it there would be four calls of the system for each message.
    """
    channel = consumer.channel
    return getattr(channel, "_impl", channel).basic_ack, channel.basic_ack


def rabbitmq_confirmed(channel: Any, confirmed: Callable[[Any], None], returned: Callable[..., None]) -> Any:
    """The channel inside of pika's blocking one, with confirms by callback: its ``basic_publish`` waits for nothing."""
    inner = channel._impl
    inner.add_on_return_callback(returned)
    inner.confirm_delivery(confirmed)
    return inner


def take_rabbitmq_connection(broker: Any) -> Any:
    """The connection that a RabbitmqBroker keeps for this thread, and keeps no longer; None if it has none.

    ``del broker.connection`` would close it, and trusts that no exception has struck in the middle of what it did.
    """
    connection = getattr(broker.state, "connection", None)
    for name in ("channel", "connection"):
        if hasattr(broker.state, name):
            delattr(broker.state, name)
    broker.connections.discard(connection)
    broker.channels.difference_update([one for one in broker.channels.copy() if one.connection is connection])
    return connection


def leave_rabbitmq_connections(broker: Any) -> object:
    """Have a RabbitmqBroker make new connections, and neither use nor close those that it has; they are returned."""
    left = (broker.state, broker.connections, broker.channels)
    broker.state, broker.connections, broker.channels = threading.local(), set(), set()
    return left


def rabbitmq_queue_arguments(broker: Any, queue_name: str) -> dict[str, Any]:
    """With which arguments a RabbitmqBroker declares a queue and its delay queue."""
    return cast("dict[str, Any]", broker._build_queue_arguments(queue_name))


def add_options(broker: Broker, middleware: Middleware) -> None:
    """Let actors use the options of a middleware that was put into the list without ``add_middleware``."""
    broker.actor_options |= middleware.actor_options


def clock_places() -> list[tuple[Any, str]]:
    """Where the modules that a StubBroker's messages pass through look at the time: each has it under ``time``.

    In `dramatiq.common` that is the function, in the others the module.
    """
    from dramatiq import common, message
    from dramatiq.middleware import retries
    from dramatiq.rate_limits import bucket, window
    from dramatiq.rate_limits.backends import stub as limits
    from dramatiq.results.backends import stub as results

    return [(module, "time") for module in (common, message, retries, bucket, window, limits, results)]


def worker_behind(middleware: Middleware) -> _worker.Worker | None:
    """The worker that has put this on its broker, to hear of new queues; it never takes it off. None behind all else."""
    return middleware.worker if isinstance(middleware, _worker._WorkerMiddleware) else None


class _InOrder(PriorityQueue[Any]):
    """A worker's queue where messages of one priority stay in their order; before Dramatiq 2.2 they do not.

    Without its locks: the thread that puts in is the one that takes out.
    """

    def _init(self, maxsize: int) -> None:
        super()._init(maxsize)
        self._numbers = itertools.count()

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        heappush(self.queue, (eta_of(item), next(self._numbers), item))

    def get_nowait(self) -> Any:
        if not self.queue:
            raise Empty
        return heappop(self.queue)[2]

    def task_done(self) -> None:
        pass


class _NoLimit:
    """Stands in for the semaphore that counts what a stub consumer has in hand, where it may have all."""

    def acquire(self, timeout: float | None = None) -> bool:
        return True

    def release(self) -> None:
        pass


def lift_stub_limit(consumer: Any) -> None:
    """Let a stub consumer have any number of messages in hand, as before Dramatiq 2.2."""
    if hasattr(consumer, "prefetch_semaphore"):
        consumer.prefetch_semaphore = _NoLimit()


class InlineWorker(_worker.Worker):
    """Dramatiq's worker without its threads: whoever has started it takes and runs the messages.

    Parameters:
      broker: What it consumes.
      hooks: Stands in for the broker where a message is processed; see `testing.draining`.
    """

    def __init__(self, broker: Broker, hooks: Any) -> None:
        # Consumers look whether there is a message, and never wait for one.
        super().__init__(broker, worker_threads=1, worker_timeout=0)
        self.hooks = hooks
        self.work_queue = _InOrder()

    def _add_consumer(self, queue_name: str, *, delay: bool = False) -> None:
        if queue_name in self.consumers:
            return
        thread = self.consumers[queue_name] = _Consumer(
            broker=self.broker, queue_name=queue_name, prefetch=2**31, work_queue=self.work_queue, worker_timeout=0
        )
        thread.hooks = self.hooks
        thread.running = True
        self.broker.emit_after("consumer_thread_boot", thread)
        thread.consumer = self.broker.consume(queue_name, prefetch=thread.prefetch, timeout=0)
        thread.delay_queue = thread.consumer.transport.delayed  # type: ignore[attr-defined]
        lift_stub_limit(thread.consumer.transport.inner)  # type: ignore[attr-defined]

    def _add_worker(self) -> None:
        self.thread = _Thread(broker=self.hooks, consumers=self.consumers, work_queue=self.work_queue, worker_timeout=0)
        self.thread.running = True
        self.broker.emit_after("worker_thread_boot", self.thread)
        self.workers.append(self.thread)

    def fetch(self, source: str) -> bool:
        """Take one message off a queue, if there is one, and put it where a worker thread, or its time, finds it."""
        thread = self.consumers[source]
        message = next(cast("Consumer", thread.consumer))
        if message is not None:
            thread.handle_message(message)
        return message is not None

    def next(self) -> MessageProxy | None:
        """The next message for a worker thread."""
        try:
            return delayed_message(self.work_queue.get_nowait())
        except Empty:
            return None

    def run(self, message: MessageProxy) -> None:
        """Process a message as a worker thread does."""
        self.thread.process_message(message)


class _Consumer(_worker.ConsumerThread):
    hooks: Any

    def post_process_message(self, message: MessageProxy) -> None:
        if not self.hooks.died:
            super().post_process_message(message)

    def join(self, timeout: float | None = None) -> None:
        self.broker.emit_before("consumer_thread_shutdown", self)


class _Thread(_worker.WorkerThread):
    def join(self, timeout: float | None = None) -> None:
        self.broker.emit_before("worker_thread_shutdown", self)


Kind = Literal["stub", "redis", "rabbitmq"]

_CLASSES: dict[Kind, str] = {"stub": "StubBroker", "redis": "RedisBroker", "rabbitmq": "RabbitmqBroker"}


def kind_of(broker: Broker) -> Kind | None:
    """``"stub"``, ``"redis"`` or ``"rabbitmq"``, subclasses included; None for any other broker."""
    for kind, name in _CLASSES.items():
        # Who has such a broker has imported its module; no client is imported that is not in use.
        module = sys.modules.get(f"dramatiq.brokers.{kind}")
        if module is not None and isinstance(broker, getattr(module, name)):
            return kind
    return None
