"""Read queues of a StubBroker."""

from __future__ import annotations

from dramatiq.brokers.stub import StubBroker
from dramatiq.common import dq_name

from ..queue_reader import ENDS, QueueReader, QueueReading, oldest

__all__ = ["StubQueueReader"]


class StubQueueReader(QueueReader):
    """Reads the queues in memory."""

    broker: StubBroker

    def _read(self, queue: str, now: int) -> QueueReading:
        broker = self.broker
        work, later = broker.queues.get(queue), broker.queues.get(dq_name(queue))
        bodies = [] if work is None else list(work.queue)
        return QueueReading(
            queue=queue,
            ready=len(bodies),
            delayed=0 if later is None else later.unfinished_tasks,
            running=0 if work is None else max(0, work.unfinished_tasks - len(bodies)),
            dead=len(broker.dead_letters_by_queue.get(queue, ())),
            oldest_ms=oldest([*bodies[:ENDS], *bodies[ENDS:][-ENDS:]], now),
            stalled_ms=self._stalled(queue, bodies[0] if bodies else None, now),
        )
