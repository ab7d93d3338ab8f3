from __future__ import annotations

import gc
import logging
from time import monotonic

import pytest
from dramatiq.asyncio import EventLoopThread, set_event_loop_thread

from dramatiq_policies.delivery.delivery import RUNNING, Delivery, current
from dramatiq_policies.interrupts import threads as interrupts


@pytest.fixture(autouse=True)
def no_callbacks_of_the_garbage_collector():
    callbacks, gc.callbacks[:] = gc.callbacks[:], []
    yield
    gc.callbacks[:] = callbacks


@pytest.fixture(autouse=True)
def fresh_timer():
    yield
    interrupts.reset()


@pytest.fixture
def event_loop():
    thread = EventLoopThread(logging.getLogger("loop"))
    thread.start(timeout=5)
    set_event_loop_thread(thread)
    yield thread
    thread.stop()
    thread.join()
    set_event_loop_thread(None)


class FakeMessage:
    actor_name = "mail"
    queue_name = "default"
    message_id = "id"
    options: dict = {}  # noqa: RUF012


@pytest.fixture
def delivery():
    delivery = Delivery(None, FakeMessage())
    delivery.stage, delivery.started, delivery.timeout_ms = RUNNING, monotonic(), 50.0
    token = current.set(delivery)
    yield delivery
    current.reset(token)
