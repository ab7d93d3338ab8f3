"""The readings of a queue monitor as gauges for StatsD."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..brokers.queue_reader import QueueReading
from .queue_thresholds import OUTBOX
from .statsd import metric_name, tag_list

if TYPE_CHECKING:
    from dramatiq import Worker

    from .statsd import Value

__all__ = ["gauges_of", "worker_gauges", "worker_report"]


def gauges_of(readings: Iterable[QueueReading], prefix: str, *, tagged: bool) -> list[Value]:
    """Return the gauges of queues and of the outbox.

    Parameters:
      prefix: Stands before the names of the gauges of queues.
      tagged: Whether the queue is a tag of the gauge, and not a part of its name.
    """
    values: list[Value] = []
    for reading in readings:
        if reading.queue == OUTBOX:
            values += [
                ("g", "outbox.pending", reading.ready or 0, ()),
                ("g", "outbox.oldest_ms", reading.oldest_ms or 0, ()),
            ]
            continue
        of_queue = prefix if tagged else f"{prefix}.{metric_name(reading.queue)}"
        tags = tag_list({"queue": reading.queue})
        for name in ("ready", "delayed", "dead", "oldest_ms"):
            value = getattr(reading, name)
            if value is not None:
                values.append(("g", f"{of_queue}.{name}", value, tags))
    return values


def worker_report(workers: Sequence[Worker]) -> dict[str, int]:
    """Return how many threads the workers of this process have, and how many of the threads are busy; empty without workers."""
    if not workers:
        return {}
    # Messages taken from the work queue and not done.
    busy = [worker.work_queue.unfinished_tasks - worker.work_queue.qsize() for worker in workers]
    return {"threads": sum(worker.worker_threads for worker in workers), "busy": sum(max(0, one) for one in busy)}


def worker_gauges(reports: Iterable[Mapping[str, Any]]) -> list[Value]:
    """Return how many threads the reporting workers have, and how many of the threads are busy."""
    totals = {"busy": 0, "threads": 0}
    for report in reports:
        for name in totals:
            totals[name] += report.get(name, 0)
    return [("g", f"workers.{name}", total, ()) for name, total in totals.items()]
