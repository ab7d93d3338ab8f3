"""Groups: a member that fails permanently is logged once, and a missing middleware costs one run, not twenty-one."""

from __future__ import annotations

import dramatiq
import pytest
from dramatiq import group, pipeline
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import GroupCallbacks
from dramatiq.rate_limits.backends import StubBackend

from dramatiq_policies import install
from dramatiq_policies.delivery.groups import group_of
from dramatiq_policies.testing import drain


@pytest.fixture
def shop():
    broker = StubBroker()
    broker.add_middleware(GroupCallbacks(StubBackend()))
    install(broker)
    called = []

    @dramatiq.actor(broker=broker, max_retries=0)
    def resize(number):
        if number in resize.broken:
            raise OSError(number)
        return number

    @dramatiq.actor(broker=broker)
    def publish():
        called.append("publish")

    resize.broken = set()
    broker.resize, broker.publish, broker.called = resize, publish, called
    return broker


def warnings_in(caplog):
    return [record for record in caplog.records if "can't complete" in record.getMessage()]


def test_a_group_with_dead_members_is_logged_once_with_its_id(shop, caplog):
    shop.resize.broken = {1, 2}
    images = group([shop.resize.message(n) for n in range(4)], broker=shop)
    images.add_completion_callback(shop.publish.message())
    images.run()
    run = drain(shop)
    (record,) = warnings_in(caplog)
    assert record.levelname == "WARNING"
    assert "ended as dead" in record.getMessage()
    assert "Replay" in record.getMessage()
    assert {group_of(dead.options) for dead in run.dead} == {record.group}
    assert shop.called == []


def test_a_group_whose_pipeline_dies_before_its_last_step_is_logged(shop, caplog):
    shop.resize.broken = {1}
    steps = pipeline([shop.resize.message(1), shop.publish.message_with_options(pipe_ignore=True)], broker=shop)
    images = group([steps], broker=shop)
    images.add_completion_callback(shop.publish.message())
    images.run()
    drain(shop)
    assert len(warnings_in(caplog)) == 1


def test_a_member_that_fails_in_no_group_is_not_logged_as_a_group(shop, caplog):
    shop.resize.broken = {1}
    shop.resize.send(1)
    drain(shop)
    assert warnings_in(caplog) == []


@pytest.mark.parametrize("missing", ["GroupCallbacks", "Results"])
def test_a_job_that_needs_a_missing_middleware_runs_once_and_is_dead(missing):
    broker = install(StubBroker())

    @dramatiq.actor(broker=broker)
    def resize(number): ...

    @dramatiq.actor(broker=broker)
    def start():
        if missing == "Results":
            resize.message(1).get_result(backend=None)
        images = group([resize.message(1)], broker=broker)
        images.add_completion_callback(resize.message(2))
        images.run()

    before = dramatiq.broker.global_broker
    dramatiq.broker.global_broker = broker
    try:
        start.send()
        run = drain(broker)
    finally:
        dramatiq.broker.global_broker = before
    assert run.outcomes(start) == ["dead"]
    assert missing.lower().rstrip("s") in run.dead[0].options["failure"]["message"].lower()


def test_a_runtime_error_of_the_job_s_own_is_still_retried():
    broker = install(StubBroker())

    @dramatiq.actor(broker=broker, max_retries=1)
    def start():
        raise RuntimeError("GroupCallbacks middleware not found!")

    start.send()
    assert drain(broker).outcomes(start) == ["retried", "dead"]
