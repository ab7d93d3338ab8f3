"""current_job() is the job that runs here, and no other."""

from __future__ import annotations

import contextvars
from concurrent.futures import ThreadPoolExecutor

import pytest
from dramatiq.middleware import (
    AsyncIO,
    Middleware,
    SkipMessage,
)

from dramatiq_policies import (
    NoCurrentJob,
    current_job,
)

from ..support import Stage
from .scenarios import (
    SOON,
    CardDeclined,
    PaymentError,
    Refused,
    Refusing,
    always,
    failing,
)


def test_current_job_is_the_job_that_runs_here_and_none_elsewhere():
    stage = Stage()
    seen = []

    @stage.actor(queue_name="money", timeout=60_000, retry_on={PaymentError: SOON})
    def pay():
        job = current_job()
        seen.append((job.message_id, job.actor, job.queue, job.attempt, job.idempotency_key))
        assert 0 < job.remaining_ms() <= 60_000
        if job.attempt == 1:
            raise PaymentError

    assert current_job(None) is None
    message = pay.send()
    assert stage.run().outcomes() == ["retried", "succeeded"]
    expected = (message.message_id, "pay", "money")
    assert seen == [(*expected, 1, message.message_id), (*expected, 2, message.message_id)]
    assert current_job(None) is None


def test_current_job_is_none_in_every_other_hook_and_after_the_job():
    seen = []

    class Looking(Middleware):
        def before_process_message(self, broker, message):
            seen.append(current_job(None))

        def after_process_message(self, broker, message, *, result=None, exception=None):
            seen.append(current_job(None))

    stage = Stage(middleware=[Looking()])
    failing(stage).send()
    stage.run()
    assert seen == [None, None]


@pytest.mark.parametrize(("error", "outcome"), [(SkipMessage(), "skipped"), (Refused(), "dead")], ids=repr)
def test_an_actor_that_is_called_after_a_message_did_not_run_is_not_that_messages_job(error, outcome):
    stage = Stage()
    seen = []

    class Calling(Refusing):
        def after_ack(self, broker, message):
            seen.append(pay())

        after_nack = after_ack

    pay = stage.actor(lambda: current_job(None), actor_name="pay", max_retries=0)
    stage.broker.add_middleware(Calling(error))
    pay.send()
    assert stage.run().outcomes() == [outcome]
    assert seen == [None]


def test_outside_of_a_job_current_job_raises_or_gives_its_default():
    with pytest.raises(NoCurrentJob, match=r"outside of a job.*current_job\(None\).*copy_context") as caught:
        current_job()
    assert isinstance(caught.value, LookupError)
    assert current_job(None) is None
    assert current_job("shell") == "shell"
    with pytest.raises(TypeError, match="at most 1 argument"):
        current_job(1, 2)


def test_an_actor_that_is_called_directly_says_that_no_job_runs():
    pay = Stage().actor(lambda: current_job().attempt, actor_name="pay")
    with pytest.raises(NoCurrentJob):
        pay()


def test_a_thread_started_by_a_job_sees_the_job_in_its_context_or_as_an_argument():
    stage = Stage()
    seen = []

    @stage.actor
    def pay():
        job = current_job()
        with ThreadPoolExecutor(1) as threads:
            seen.append(threads.submit(current_job, None).result())
            seen.append(threads.submit(contextvars.copy_context().run, lambda: current_job().actor).result())
            seen.append(threads.submit(lambda: job.actor).result())

    pay.send()
    assert stage.run().outcomes() == ["succeeded"]
    assert seen == [None, "pay", "pay"]


def test_a_nested_call_of_an_actor_sees_the_job_that_calls_it():
    stage = Stage()
    inner = stage.actor(lambda: current_job().actor, actor_name="inner")
    seen = []
    outer = stage.actor(lambda: seen.append((inner(), current_job().actor)), actor_name="outer")
    outer.send()
    assert stage.run().outcomes() == ["succeeded"]
    assert seen == [("outer", "outer")]


def test_an_async_job_is_classified_and_sees_itself():
    stage = Stage(middleware=[AsyncIO()])
    seen = []

    @stage.actor(retry_on={PaymentError: SOON})
    async def pay():
        job = current_job()
        seen.append((job.actor, job.attempt))
        if job.attempt < 3:
            raise PaymentError

    pay.send()
    assert stage.run().outcomes() == ["retried", "retried", "succeeded"]
    assert seen == [("pay", 1), ("pay", 2), ("pay", 3)]


def test_an_actor_called_directly_raises_its_own_error():
    pay = always(Stage(), CardDeclined(), discard_on=CardDeclined)
    with pytest.raises(CardDeclined):
        pay()
