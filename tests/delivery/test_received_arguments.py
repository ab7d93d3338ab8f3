"""A job that changes its own arguments in place changes nothing that is sent again."""

from __future__ import annotations

import dramatiq
import pytest
from dramatiq import Message, Middleware, Worker, pipeline

from dramatiq_policies import ErrorClassifier, RetryPolicy, Snooze, constant, current_job, install
from dramatiq_policies.delivery.delivery import Delivery
from dramatiq_policies.testing import drain

from ..brokers.test_other_brokers import ListBroker
from ..support import Collector, Stage

ORDER = {"id": 1, "secret": "s", "lines": [1, 2]}
RULE = {ConnectionError: RetryPolicy(attempts=3, wait=constant(200))}


class Seen(list):
    """The arguments of each run, copied at its start."""

    def note(self, order):
        self.append({**order, "lines": [*order["lines"]]})


def spoil(order):
    order.pop("secret", None)
    order["lines"].clear()
    order["at"] = object()  # No encoder takes it.


@pytest.mark.parametrize("by_name", [False, True])
def test_every_attempt_and_the_dead_letter_have_the_arguments_as_they_were_sent(by_name):
    stage, seen = Stage(), Seen()

    def job(order):
        seen.note(order)
        spoil(order)
        raise ConnectionError

    actor = stage.actor(job, actor_name="job", retry_on=RULE)
    actor.send(order=ORDER) if by_name else actor.send(ORDER)
    assert stage.run().outcomes() == ["retried", "retried", "dead"]
    assert seen == [ORDER] * 3
    (letter,) = stage.dead
    assert (letter.args, letter.kwargs) == ((), {"order": ORDER}) if by_name else ((ORDER,), {})


@pytest.mark.parametrize("change", [spoil, lambda order: order.clear()], ids=["spoil", "clear"])
def test_a_snoozed_job_gets_the_arguments_as_they_were_sent(change):
    stage, seen = Stage(), Seen()

    def job(order):
        seen.note(order)
        change(order)
        if len(seen) < 3:
            raise Snooze(10)

    stage.actor(job, actor_name="job").send(ORDER)
    assert stage.run().outcomes() == ["deferred", "deferred", "succeeded"]
    assert seen == [ORDER] * 3


def test_a_key_made_from_an_argument_is_the_same_in_each_attempt():
    stage, keys = Stage(), []

    def job(order):
        keys.append(current_job().idempotency_key)
        spoil(order)
        raise ConnectionError

    stage.actor(job, actor_name="job", retry_on=RULE, idempotency_key="{order[secret]}").send(ORDER)
    assert stage.run().outcomes() == ["retried", "retried", "dead"]
    assert keys == ["s"] * 3


def test_a_change_of_an_argument_by_a_key_or_done_when_is_not_sent_again():
    stage, seen = Stage(), Seen()

    def key(order):
        return order.pop("secret")

    def done_when(order):
        order["lines"].clear()
        return False

    def job(order):
        if len(seen) == 0:
            seen.append(1)
            raise ConnectionError
        seen.append(order["id"])

    stage.actor(job, actor_name="job", retry_on=RULE, idempotency_key=key, done_when=done_when).send(ORDER)
    assert stage.run().outcomes() == ["retried", "succeeded"]
    assert stage.broker.dead_letters == []


class Decrypts(Middleware):
    """Changes arguments in place before the run, and an option during it."""

    def before_process_message(self, broker, message):
        message.args[0]["secret"] = "plain"
        message.options["seen"] = message.options.get("seen", 0) + 1


def test_a_middleware_s_changes_of_arguments_are_not_sent_again_and_its_options_are():
    stage = Stage(middleware=[Decrypts()])
    ran = []

    def job(order):
        ran.append(order["secret"])
        raise ConnectionError

    stage.actor(job, actor_name="job", retry_on=RULE).send(ORDER)
    assert stage.run().outcomes() == ["retried", "retried", "dead"]
    assert ran == ["plain"] * 3
    (letter,) = stage.dead
    assert letter.args == (ORDER,)
    assert letter.options["seen"] == 3


def test_a_drain_gives_each_attempt_the_arguments_as_they_were_sent():
    stage, seen = Stage(), Seen()

    def job(order):
        seen.note(order)
        spoil(order)
        raise ConnectionError

    stage.actor(job, actor_name="job", retry_on=RULE).send(ORDER)
    assert drain(stage.broker).outcomes() == ["retried", "retried", "dead"]
    assert seen == [ORDER] * 3


def test_the_next_step_of_a_pipeline_gets_its_own_arguments_and_the_result():
    stage, got = Stage(), []

    def first(order):
        spoil(order)
        return 7

    second = stage.actor(lambda *args: got.append(args), actor_name="second")
    first = stage.actor(first, actor_name="first")
    pipeline([first.message(ORDER), second.message(ORDER)], broker=stage.broker).run()
    assert stage.run().outcomes() == ["succeeded", "succeeded"]
    assert got == [(ORDER, 7)]


def test_a_body_that_cannot_be_decoded_again_leaves_the_message_as_it_is():
    message = Message("q", "job", (1,), {}, {})
    delivery = Delivery(None, message)
    for body in (None, b"{"):
        delivery.body = body
        assert delivery.next_message(retries=1).args == (1,)
        delivery.restore_arguments(message)
        assert message.args == (1,)


def test_a_broker_that_shows_no_bodies_gets_the_arguments_as_they_were_delivered():
    broker, events, seen = ListBroker(), Collector(), Seen()
    install(broker, error_classifier=ErrorClassifier(on_outcome=events))

    @dramatiq.actor(broker=broker, retry_on=RULE)
    def job(order):
        seen.note(order)
        spoil(order)
        raise ConnectionError

    job.send(ORDER)
    worker = Worker(broker, worker_timeout=20, worker_threads=1)
    worker.start()
    try:
        events.wait_for(lambda got: len(got) == 3)
    finally:
        worker.stop()
    assert seen == [ORDER] * 3
