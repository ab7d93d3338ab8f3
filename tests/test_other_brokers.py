"""On a broker that is none of the three every rule works, and what can't be done is said once."""

from __future__ import annotations

import logging
from queue import Empty, Queue

import dramatiq
from dramatiq import Message, Worker
from dramatiq.broker import Broker, Consumer, MessageProxy
from dramatiq.common import dq_name

from dramatiq_policies import ErrorClassifier, RetryPolicy, install


class ListConsumer(Consumer):
    def __init__(self, broker, queue_name):
        self.broker = broker
        self.queue = broker.queues[queue_name]

    def __next__(self):
        try:
            return MessageProxy(Message.decode(self.queue.get(timeout=0.02)))
        except Empty:
            return None

    def ack(self, message):
        self.broker.acked.append(message.message_id)

    def nack(self, message):
        self.broker.nacked.append(message.message_id)


class ListBroker(Broker):
    """As small as a broker of somebody else's can be."""

    def __init__(self):
        super().__init__()
        self.acked, self.nacked = [], []

    def consume(self, queue_name, prefetch=1, timeout=30_000):
        return ListConsumer(self, queue_name)

    def declare_queue(self, queue_name):
        if queue_name not in self.queues:
            self.queues[queue_name] = Queue()
            self.emit_after("declare_queue", queue_name)
            self.queues[dq_name(queue_name)] = Queue()
            self.delay_queues.add(dq_name(queue_name))
            self.emit_after("declare_delay_queue", dq_name(queue_name))

    def enqueue(self, message, *, delay=None):
        queue_name = message.queue_name
        if delay is not None:
            queue_name = dq_name(queue_name)
            eta = dramatiq.common.current_millis() + delay
            message = message.copy(queue_name=queue_name, options={"eta": eta})
        self.emit_before("enqueue", message, delay)
        self.queues[queue_name].put(message.encode())
        self.emit_after("enqueue", message, delay)
        return message


def test_every_rule_works_and_a_dead_letter_without_a_reason_is_said_once(caplog):
    caplog.set_level(logging.INFO, "dramatiq_policies")
    done = Queue()
    broker = install(ListBroker(), error_classifier=ErrorClassifier(on_outcome=done.put))

    @dramatiq.actor(
        broker=broker,
        retry_on={ValueError: RetryPolicy(attempts=2, wait=10)},
        discard_on=KeyError,
        alert_on=ConnectionError,
    )
    def job(error):
        if error is not None:
            raise {"value": ValueError, "key": KeyError, "connection": ConnectionError}[error]

    sent = {error: job.send(error).message_id for error in (None, "value", "key", "connection")}
    worker = Worker(broker, worker_timeout=20, worker_threads=1)
    worker.start()
    events = [done.get(timeout=10) for _ in range(5)]
    worker.stop()

    assert sorted(event.outcome.value for event in events) == ["alerted", "dead", "discarded", "retried", "succeeded"]
    assert set(broker.nacked) == {sent["value"], sent["connection"]}
    assert {sent[None], sent["key"]} < set(broker.acked)
    assert sum("carry no reason" in record.getMessage() for record in caplog.records) == 1
