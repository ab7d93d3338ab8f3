"""The gauges of a queue monitor."""

from __future__ import annotations

from dramatiq_policies.brokers.queue_reader import QueueReading
from dramatiq_policies.observability.queue_gauges import gauges_of, worker_gauges
from dramatiq_policies.observability.queue_thresholds import OUTBOX

MAIL = QueueReading(queue="mail", ready=3, delayed=0, dead=None, oldest_ms=250)


def test_without_tags_the_queue_is_in_the_name_and_an_unknown_figure_is_left_out() -> None:
    assert [(kind, name, value) for kind, name, value, _ in gauges_of([MAIL], "queues", tagged=False)] == [
        ("g", "queues.mail.ready", 3),
        ("g", "queues.mail.delayed", 0),
        ("g", "queues.mail.oldest_ms", 250),
    ]


def test_with_tags_all_queues_share_the_names() -> None:
    gauges = gauges_of([MAIL], "jobs.queues", tagged=True)
    assert {name for _, name, _, _ in gauges} == {"jobs.queues.ready", "jobs.queues.delayed", "jobs.queues.oldest_ms"}
    assert {tuple(tags) for *_, tags in gauges} == {("queue:mail",)}


def test_the_outbox_has_two_gauges_of_its_own() -> None:
    outbox = QueueReading(queue=OUTBOX, ready=7, delayed=None, dead=None, oldest_ms=None)
    assert gauges_of([outbox], "queues", tagged=True) == [
        ("g", "outbox.pending", 7, ()),
        ("g", "outbox.oldest_ms", 0, ()),
    ]


def test_threads_are_summed_over_the_workers_that_report_them() -> None:
    reports = [{"busy": 2, "threads": 8}, {"taken": {}}, {"busy": 1, "threads": 4}]
    assert worker_gauges(reports) == [("g", "workers.busy", 3, ()), ("g", "workers.threads", 12, ())]
