"""Dramatiq's worker on the thread of the test. It overrides private methods of Dramatiq's worker."""

from __future__ import annotations

import itertools
from heapq import heappop, heappush
from queue import Empty, PriorityQueue
from typing import Any, cast

from dramatiq.broker import Broker, Consumer, MessageProxy
from dramatiq.worker import ConsumerThread, Worker, WorkerThread

from .. import _dramatiq

__all__ = ["InlineWorker"]


class _InOrder(PriorityQueue[Any]):
    """A work queue that keeps the order of messages with equal priority, also before Dramatiq 2.2.

    Without locks, because a single thread puts and takes.
    """

    def _init(self, maxsize: int) -> None:
        super()._init(maxsize)
        self._numbers = itertools.count()

    def put(self, item: object, block: bool = True, timeout: float | None = None) -> None:
        heappush(self.queue, (_dramatiq.eta_of(item), next(self._numbers), item))

    def get_nowait(self) -> Any:
        if not self.queue:
            raise Empty
        return heappop(self.queue)[2]

    def task_done(self) -> None:
        pass


class InlineWorker(Worker):
    """Dramatiq's worker without threads: the caller takes and runs the messages.

    Parameters:
      broker: The broker to consume from.
      hooks: Replaces the broker during the processing of a message; see `testing.draining`.
    """

    def __init__(self, broker: Broker, hooks: Any) -> None:
        # Timeout 0: consumers never wait for a message.
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
        _dramatiq.lift_stub_limit(thread.consumer.transport.inner)  # type: ignore[attr-defined]

    def _add_worker(self) -> None:
        self.thread = _Thread(broker=self.hooks, consumers=self.consumers, work_queue=self.work_queue, worker_timeout=0)
        self.thread.running = True
        self.broker.emit_after("worker_thread_boot", self.thread)
        self.workers.append(self.thread)

    def fetch(self, source: str) -> bool:
        """Move one message from the broker to the work queue or the delay queue. Return False if the queue is empty."""
        thread = self.consumers[source]
        message = next(cast("Consumer", thread.consumer))
        if message is not None:
            thread.handle_message(message)
        return message is not None

    def next(self) -> MessageProxy | None:
        """Take the next message of the work queue."""
        try:
            return _dramatiq.delayed_message(self.work_queue.get_nowait())
        except Empty:
            return None

    def run(self, message: MessageProxy) -> None:
        """Process a message like a worker thread."""
        self.thread.process_message(message)


class _Consumer(ConsumerThread):
    hooks: Any

    def post_process_message(self, message: MessageProxy) -> None:
        if not self.hooks.died:
            super().post_process_message(message)

    def join(self, timeout: float | None = None) -> None:
        self.broker.emit_before("consumer_thread_shutdown", self)


class _Thread(WorkerThread):
    def join(self, timeout: float | None = None) -> None:
        self.broker.emit_before("worker_thread_shutdown", self)
