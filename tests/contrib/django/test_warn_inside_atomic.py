"""Messages that are sent inside of `atomic` without an outbox."""

from __future__ import annotations

import re

import dramatiq
import pytest
from django.db import transaction
from dramatiq.brokers.stub import StubBroker

from dramatiq_policies import install
from dramatiq_policies.contrib.django import SentInsideAtomic, WarnInsideAtomic


@pytest.fixture
def warn():
    return WarnInsideAtomic()


@pytest.fixture
def job(warn):
    broker = StubBroker()
    broker.add_middleware(warn)
    install(broker)

    @dramatiq.actor(broker=broker)
    def job():
        pass

    return job


def waiting(job):
    return job.broker.queues["default"].qsize()


def test_sending_inside_of_atomic_is_warned_of_once_with_the_line_that_does(job, caplog):
    for _ in range(2):
        with transaction.atomic():
            job.send()
    (record,) = caplog.records
    assert record.name == "dramatiq_policies.django"
    assert record.levelname == "WARNING"
    assert record.actor == "job"
    assert record.database == "default"
    assert re.search(r"test_warn_inside_atomic\.py:\d+$", record.call_site)
    assert record.call_site in record.getMessage()
    assert waiting(job) == 2


def test_strict_sends_nothing_and_raises(job, warn):
    warn.strict = True
    with pytest.raises(SentInsideAtomic), transaction.atomic():
        job.send()
    assert waiting(job) == 0


def test_outside_of_atomic_in_a_callback_and_in_a_test_case_s_block_nothing_is_logged(job, caplog):
    job.send()
    with transaction.atomic():
        transaction.on_commit(job.send)
    block = transaction.atomic()
    block._from_testcase = True
    with block:
        job.send()
    assert caplog.records == []
    assert waiting(job) == 3
