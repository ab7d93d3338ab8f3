"""Failures between a decision and its acknowledgement; the rest is in tests/middleware/test_error_classifier_*.py."""

from __future__ import annotations

import time

import pytest
from dramatiq import Message, Middleware, pipeline
from dramatiq.results import ResultFailure, ResultMissing, Results
from dramatiq.results.backends import StubBackend

from dramatiq_policies.brokers.stub.transport import StubTransport
from dramatiq_policies.delivery import publishing, returned
from dramatiq_policies.delivery.broker_state import state_of
from dramatiq_policies.delivery.delivery import DeliveryReassigned
from dramatiq_policies.delivery.refusals import Unsendable
from dramatiq_policies.testing import drain

from ..support import Stage

TRANSPORT = "dramatiq_policies.brokers.stub.transport.StubTransport"


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("dramatiq_policies.delivery.publishing._RETRY_REFUSAL_FOR", 0.05)
    monkeypatch.setattr("dramatiq_policies.delivery.publishing._RETRY_PAUSES", (0.0, 0.01))
    monkeypatch.setattr("dramatiq_policies.delivery.returned._FIRST_RETURN", 100)


def test_a_message_that_no_decision_was_made_on_is_dead_and_never_acked_as_a_success():
    stage = Stage()
    job = stage.actor(lambda: None, actor_name="job")
    sent = job.send()
    consumer = stage.broker.consume("default")
    consumer.ack(next(consumer))
    assert (stage.outcomes(), stage.reasons()) == (["dead"], ["handoff_failed"])
    assert [letter.message_id for letter in stage.dead] == [sent.message_id]
    assert "made no decision" in stage.failures()[0]["message"]


def test_a_message_whose_dead_letter_is_refused_too_is_redelivered(impatient, monkeypatch, caplog):
    stage = Stage()
    ran = []

    def fail():
        ran.append(1)
        1 / 0  # noqa: B018

    job = stage.actor(fail, actor_name="job", max_retries=0)
    sent = job.send()

    def refuse(*args):
        raise ValueError("too large")

    with monkeypatch.context() as patch:
        patch.setattr("dramatiq_policies.brokers.stub.transport.StubTransport.dead_letter", refuse)
        with stage.working():
            stage.collected.wait_for(lambda events: events)
    assert (stage.outcomes(), stage.reasons()) == (["interrupted"], ["handoff_failed"])
    assert "make room in the dead-letter queue" in caplog.text
    assert stage.dead == []
    assert stage.run().outcomes() == ["interrupted", "dead"]
    assert [letter.message_id for letter in stage.dead] == [sent.message_id]
    # It is not run again: the dead letter tells of the run that has failed.
    assert len(ran) == 1
    assert stage.failures()[0]["exception"] == "builtins.ZeroDivisionError"
    assert stage.reasons() == ["handoff_failed", "unclassified"]
    assert "returned" not in stage.dead[0].options


def test_a_message_that_stores_no_results_stores_no_failure():
    results = Results(backend=StubBackend())
    stage = Stage(middleware=[results])
    loud, silent = (
        stage.actor(lambda: 1 / 0, actor_name=f"job{store}", max_retries=0, store_results=store).send()
        for store in (True, False)
    )
    assert stage.run().outcomes() == ["dead", "dead"]
    with pytest.raises(ResultFailure, match="division by zero"):
        loud.get_result(backend=results.backend)
    with pytest.raises(ResultMissing):
        silent.get_result(backend=results.backend)


@pytest.fixture
def acks(monkeypatch):
    acked = []
    monkeypatch.setattr(f"{TRANSPORT}.ack", lambda consumer, message: acked.append(message.message_id))
    return acked


def taken(stage, **options):
    """A consumer and the message that it holds."""
    stage.actor(lambda: None, actor_name="job")
    stage.broker.enqueue(Message("default", "job", (), {}, options))
    consumer = stage.broker.consume("default")
    return consumer, next(consumer)


def test_a_message_acked_again_after_a_lost_connection_is_settled_once(acks):
    stage = Stage()
    consumer, message = taken(stage)
    for _ in range(2):
        consumer.ack(message)
    assert (stage.outcomes(), len(acks)) == (["dead"], 2)
    assert len(stage.dead) == 1


def test_at_a_shutdown_a_publish_is_tried_twice_and_then_the_message_is_redelivered(monkeypatch, acks):
    stage = Stage()
    consumer, message = taken(stage)
    state_of(stage.broker).stopping.set()
    tries = []

    def refuse(*args):
        tries.append(1)
        raise ConnectionError

    monkeypatch.setattr(f"{TRANSPORT}.publish_follow_ups", refuse)
    consumer.ack(message)
    assert len(tries) == 2
    assert (stage.outcomes(), stage.reasons(), acks) == (["interrupted"], ["handoff_failed"], [])


def test_a_message_that_the_broker_has_taken_back_meanwhile_publishes_nothing(monkeypatch, acks):
    stage = Stage()
    consumer, message = taken(stage)
    handed = []
    monkeypatch.setattr(f"{TRANSPORT}.is_revoked", lambda consumer: True)
    monkeypatch.setattr(f"{TRANSPORT}.publish_follow_ups", lambda *args: handed.append(args))
    consumer.ack(message)
    assert (stage.outcomes(), stage.reasons(), acks, handed) == (["interrupted"], ["handoff_failed"], [], [])


@pytest.mark.parametrize(("error", "gone"), [(DeliveryReassigned(), False), (ConnectionError(), True)], ids=repr)
def test_a_publish_is_not_tried_again_once_the_broker_has_taken_the_message_back(monkeypatch, acks, error, gone):
    stage = Stage()
    consumer, message = taken(stage)
    tries = []

    def refuse(*args):
        tries.append(1)
        monkeypatch.setattr(f"{TRANSPORT}.is_revoked", lambda consumer: gone)
        raise error

    monkeypatch.setattr(f"{TRANSPORT}.publish_follow_ups", refuse)
    consumer.ack(message)
    assert len(tries) == 1
    assert (stage.outcomes(), stage.reasons(), acks) == (["interrupted"], ["handoff_failed"], [])


def test_a_success_with_a_key_that_the_broker_has_taken_back_is_published_until_its_next_step_is_accepted(monkeypatch):
    # A cluster without a leader refuses for longer than five seconds. Another run would double the effect.
    monkeypatch.setattr("dramatiq_policies.delivery.publishing._RETRY_REFUSAL_FOR", 0.0)
    monkeypatch.setattr("dramatiq_policies.delivery.publishing._RETRY_PAUSES", (0.0,))
    stage = Stage()
    ran, answers = [], [RuntimeError("no leader")] * 3 + ["accepted"]
    charge = stage.actor(lambda order: ran.append(f"charge {order}"), actor_name="charge", idempotency_key="{order}")
    receipt = stage.actor(lambda charged: ran.append("receipt"), actor_name="receipt")
    publish = StubTransport.publish_follow_ups

    def refuse_at_first(transport, *args):
        if answers and isinstance(answer := answers.pop(0), RuntimeError):
            raise answer
        publish(transport, *args)

    # Accepted at last over a new connection.
    monkeypatch.setattr(StubTransport, "is_revoked", lambda transport: 0 < len(answers) < 4)
    monkeypatch.setattr(StubTransport, "publish_follow_ups", refuse_at_first)
    pipeline([charge.message(7), receipt.message()], broker=stage.broker).run()
    assert stage.run().outcomes() == ["succeeded", "succeeded"]
    assert (ran, answers, stage.dead) == (["charge 7", "receipt"], [], [])


@pytest.mark.parametrize("replays", [0, 2])
def test_a_dead_letter_keeps_only_its_counter_of_replays(replays):
    stage = Stage()
    consumer, message = taken(stage, policies={"replays": replays, "total": 3})
    consumer.ack(message)
    (letter,) = stage.dead
    assert letter.options.get("policies") == ({"replays": replays} if replays else None)


def test_a_success_listener_is_called_for_successes_alone():
    stage = Stage()
    told = []
    state_of(stage.broker).outcomes.success_listeners = (told.append,)
    stage.actor(lambda: None, actor_name="good").send()
    stage.actor(lambda: 1 / 0, actor_name="bad", max_retries=0).send()
    assert sorted(stage.run().outcomes()) == ["dead", "succeeded"]
    assert [delivery.message.actor_name for delivery in told] == ["good"]


class Unfit(Middleware):
    """Puts into a message's options what no encoder takes, as a tracer might."""

    def before_process_message(self, broker, message):
        message.options["span"] = object()


def test_a_dead_letter_that_cannot_be_encoded_is_made_from_the_message_as_received():
    stage = Stage(middleware=[Unfit()])
    stage.actor(lambda order: 1 / 0, actor_name="job", max_retries=0).send({"id": 1})
    began = time.monotonic()
    assert stage.run().outcomes() == ["dead"]
    assert time.monotonic() - began < publishing._RETRY_REFUSAL_FOR
    (letter,) = stage.dead
    assert (letter.args, "span" in letter.options) == (({"id": 1},), False)
    assert letter.options["failure"]["exception"] == "builtins.ZeroDivisionError"


def test_a_retry_that_cannot_be_encoded_is_dead_at_once():
    stage = Stage(middleware=[Unfit()])
    stage.actor(lambda: 1 / 0, actor_name="job", max_retries=3).send()
    assert drain(stage.broker).outcomes() == ["dead"]
    assert stage.reasons() == ["handoff_failed"]


def test_a_message_that_cannot_be_encoded_at_all_is_dead_as_received(monkeypatch):
    stage = Stage()
    sent = stage.actor(lambda: 1 / 0, actor_name="job", max_retries=0).send()
    body = stage.broker.queues["default"].queue[0]

    def refuse(message):
        raise RecursionError("too deep")

    monkeypatch.setattr(Message, "encode", refuse)
    assert drain(stage.broker).outcomes() == ["dead"]
    assert stage.reasons() == ["unclassified"]
    (letter,) = stage.dead
    assert letter.options["raw"] == body.decode()
    assert sent.message_id in letter.options["raw"]


def test_a_message_that_can_be_sent_in_no_form_keeps_its_slot_for_a_while_and_then_runs_again(impatient, monkeypatch):
    stage = Stage()
    fails = []

    def job():
        fails.append(1)
        if len(fails) == 1:
            raise ValueError

    stage.actor(job, actor_name="job", max_retries=0).send()

    def refuse(*args):
        raise Unsendable("never")

    with monkeypatch.context() as patch:
        patch.setattr(f"{TRANSPORT}.publish_follow_ups", refuse)
        with stage.working():
            stage.collected.wait_for(lambda events: events)
            patch.undo()
            stage.collected.wait_for(lambda events: len(events) == 2)
    assert list(zip(stage.outcomes(), stage.reasons(), strict=True)) == [
        ("interrupted", "handoff_failed"),
        ("succeeded", None),
    ]


@pytest.mark.parametrize("value", [0, "1", True, None, {}])
def test_a_message_that_only_says_that_it_was_returned_is_run(value):
    stage = Stage()
    stage.actor(lambda: None, actor_name="job")
    stage.broker.enqueue(Message("default", "job", (), {}, {"returned": value}))
    assert stage.run().outcomes() == ["succeeded"]


def test_the_wait_of_a_returned_message_grows_up_to_five_minutes():
    assert [returned.wait_before_return(times) for times in (0, 1, 4, 5, 10**9)] == [
        10_000, 20_000, 160_000, 300_000, 300_000,
    ]  # fmt: skip
