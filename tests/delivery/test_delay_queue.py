"""The delayed messages in hand, and moving those that are due."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
from dramatiq import Message, Worker
from dramatiq import worker as dramatiq_worker
from dramatiq.broker import MessageProxy
from dramatiq.common import current_millis

from dramatiq_policies import _dramatiq
from dramatiq_policies.delivery.delay_queue import DelayQueue
from dramatiq_policies.delivery.moving_delayed import BATCH, Move

from ..support import Stage


def item(eta):
    return _dramatiq.delay_item(eta, MessageProxy(Message("mail.DQ", "job", (), {}, {"eta": eta})))


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def filled(etas) -> DelayQueue:
    queue = DelayQueue()
    for eta in etas:
        queue.put(item(eta))
    return queue


def test_the_nearest_of_many_messages_are_kept_and_the_others_are_cut_off():
    etas = [*range(50), 7, 7, 7]
    random.Random(1).shuffle(etas)
    queue = filled(etas)
    far = queue.cut(20)
    assert sorted(_dramatiq.eta_of(one) for one in far) == sorted(etas)[20:]
    assert [_dramatiq.eta_of(one) for one in queue.due(1_000, 100)] == sorted(etas)[:20]


def test_a_message_put_in_after_a_cut_comes_in_its_turn():
    queue = filled(range(10, 30))
    queue.cut(5)
    for eta in (3, 12, 99):
        queue.put(item(eta))
    assert [_dramatiq.eta_of(one) for one in queue.due(100, 100)] == [3, 10, 11, 12, 12, 13, 14, 99]


def test_due_messages_are_taken_up_to_a_limit_and_others_stay():
    queue = filled([1, 2, 3, 50])
    assert [_dramatiq.eta_of(one) for one in queue.due(10, 2)] == [1, 2]
    assert [_dramatiq.eta_of(one) for one in queue.due(10, 2)] == [3]
    assert queue.due(10, 2) == []
    assert queue.next_eta() == 50


def test_a_join_of_the_delay_queue_waits_for_messages_taken_and_not_finished():
    queue = filled([1, 2])
    (taken, _) = queue.due(10, 10)
    queue.task_done()
    assert queue.unfinished_tasks == 1
    queue.put(taken)
    queue.task_done()
    assert queue.unfinished_tasks == 1


def test_a_moved_message_was_ready_when_its_time_came_unless_it_says_more():
    late = Move.of(item(5_000), "mail").moved
    assert (late.queue_name, late.options) == ("mail", {"ready_at": 5_000})
    told = _dramatiq.delay_item(5, MessageProxy(Message("mail.DQ", "job", (), {}, {"eta": 5, "ready_at": 1})))
    assert Move.of(told, "mail").moved.options == {"ready_at": 1}


def test_a_nearer_message_on_a_stub_broker_runs_on_time_behind_any_number_of_far_ones(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(dramatiq_worker, "DELAY_QUEUE_PREFETCH", 5)
    stage, ran = Stage(), []
    job = stage.actor(ran.append, actor_name="job")
    for number in range(20):
        job.send_with_options(args=(number,), delay=3_600_000)
    job.send_with_options(args=("near",), delay=100)
    worker = Worker(stage.broker, worker_timeout=50, worker_threads=1)
    worker.start()
    try:
        until(lambda: ran)
    finally:
        worker.stop()
    assert ran == ["near"]
    assert stage.broker.queues["default.DQ"].unfinished_tasks == 20


def test_more_due_messages_than_one_batch_all_run(monkeypatch: pytest.MonkeyPatch):
    stage, ran = Stage(), []
    job = stage.actor(ran.append, actor_name="job")
    due = current_millis() + 300
    for number in range(3 * BATCH):
        job.send_with_options(args=(number,), delay=max(0, due - current_millis()))
    worker = Worker(stage.broker, worker_timeout=50, worker_threads=2)
    worker.start()
    try:
        until(lambda: len(ran) == 3 * BATCH)
        worker.join()
    finally:
        worker.stop()
    assert sorted(ran) == list(range(3 * BATCH))
