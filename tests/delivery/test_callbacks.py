"""``on_success``, ``on_failure`` and ``on_retry_exhausted`` are follow-up messages, and a rule's retries look like Dramatiq's."""

from __future__ import annotations

import builtins

import pytest
from dramatiq.common import dq_name
from dramatiq.errors import Retry
from dramatiq.middleware import Callbacks as StockCallbacks
from dramatiq.middleware import Middleware, Shutdown

from dramatiq_policies import Discard, RetryPolicy, Snooze
from dramatiq_policies.delivery import publishing
from dramatiq_policies.delivery.history import attempt_of, run_of
from dramatiq_policies.idempotency.claims import Claims

from ..support import Stage

ONCE, TWICE = RetryPolicy(attempts=1), RetryPolicy(attempts=2, wait=1)


class Told(Stage):
    """A stage with an actor for each callback, which notes what it is told."""

    def __init__(self, **options):
        super().__init__(**options)
        self.told = []
        for name in ("done", "failed", "gave_up"):
            self.actor(lambda message, info, name=name: self.told.append((name, message, info)), actor_name=name)

    def job(self, *errors, result="done", **declared):
        left = list(errors)

        def job(*args):
            if left:
                raise left.pop(0)
            return result

        return self.actor(
            job, actor_name="job", **{"min_backoff": 1, "max_backoff": 2, "pipe_ignore": True, **declared}
        )

    def names(self):
        return [name for name, *_ in self.told]


ALL = {"on_success": "done", "on_failure": "failed", "on_retry_exhausted": "gave_up"}


@pytest.mark.parametrize(
    ("errors", "declared", "told", "ended"),
    [
        ([], {}, ["done"], "succeeded"),
        ([OSError()], {"retry_on": {OSError: TWICE}}, ["failed", "done"], "succeeded"),
        ([OSError()], {}, ["failed", "done"], "succeeded"),
        ([Retry(delay=1)], {}, ["failed", "done"], "succeeded"),
        ([OSError(), OSError()], {"retry_on": {OSError: TWICE}}, ["failed", "failed", "gave_up"], "dead"),
        (
            [OSError()],
            {"retry_on": {OSError: RetryPolicy(attempts=1, then="discard")}},
            ["failed", "gave_up"],
            "discarded",
        ),
        ([OSError()], {"retry_on": {OSError: RetryPolicy(attempts=1, then="alert")}}, ["failed", "gave_up"], "alerted"),
        ([OSError(), OSError()], {"max_retries": 1}, ["failed", "failed", "gave_up"], "dead"),
        ([OSError()], {"discard_on": OSError}, ["failed"], "discarded"),
        ([Discard("no")], {}, ["failed"], "discarded"),
        ([OSError()], {"alert_on": OSError}, ["failed"], "alerted"),
        ([OSError()], {"throws": OSError}, ["failed"], "dead"),
        ([Snooze(1)], {}, ["done"], "succeeded"),
        ([Shutdown()], {}, ["done"], "succeeded"),
        ([Shutdown()], {"max_retries": 0}, ["failed"], "dead"),
    ],
)
def test_each_callback_is_called_for_its_event(errors, declared, told, ended):
    stage = Told()
    stage.job(*errors, **ALL, **declared).send()
    stage.run()
    assert sorted(stage.names()) == sorted(told)
    assert stage.outcomes("job")[-1] == ended


@pytest.mark.skipif(not hasattr(builtins, "ExceptionGroup"), reason="exception groups are new in 3.11")
def test_on_failure_is_not_called_for_a_snooze_in_an_exception_group():
    stage = Told()
    stage.job(builtins.ExceptionGroup("several", [Snooze(1)]), **ALL).send()
    stage.run()
    assert stage.names() == ["done"]


def test_a_callback_gets_the_arguments_that_dramatiq_passes():
    stage = Told()
    message = stage.job(OSError("disk"), OSError("full"), **ALL, retry_on={OSError: TWICE}).send(7)
    stage.run()
    (_, first, failure), (_, second, last), (_, _, exhausted) = sorted(stage.told, key=lambda told: told[0])
    assert (first["message_id"], first["args"]) == (message.message_id, [7])
    assert (failure, last) == ({"type": "OSError", "message": "disk"}, {"type": "OSError", "message": "full"})
    assert exhausted == {"retries": 1, "max_retries": 1}
    assert first["options"]["retries"] == second["options"]["retries"] == 1


def test_on_success_gets_the_result():
    stage = Told()
    stage.job(**ALL, result={"total": 3}).send()
    stage.run()
    assert [(name, info) for name, _, info in stage.told] == [("done", {"total": 3})]


def test_a_message_s_own_callback_comes_before_its_actor_s():
    stage = Told()
    stage.job(on_success="failed").send_with_options(on_success="done")
    stage.run()
    assert stage.names() == ["done"]


def test_a_callback_gets_the_arguments_as_they_were_received():
    stage = Told()

    @stage.actor(**ALL, retry_on={OSError: TWICE})
    def job(order):
        order.pop("secret")
        if len(stage.told) == 0 and not stage.outcomes():
            raise OSError

    job.send({"secret": 1, "id": 2})
    stage.run()
    assert sorted(stage.names()) == ["done", "failed"]
    assert [message["args"] for _, message, _ in stage.told] == [[{"secret": 1, "id": 2}]] * 2


@pytest.mark.parametrize(
    ("errors", "told"), [([], ["done"]), ([OSError()], ["failed", "done"]), ([OSError(), OSError()], ["failed"] * 2)]
)
def test_a_callback_that_is_not_accepted_at_once_is_sent_again_and_the_job_is_not_acked_before(errors, told):
    stage = Told()
    stage.job(*errors, **ALL, retry_on={OSError: TWICE}).send()
    enqueue, refused = stage.broker.enqueue, set()

    def not_at_once(message, *, delay=None):
        if message.message_id not in refused and message.queue_name != dq_name("default"):
            refused.add(message.message_id)
            raise ConnectionError("lost for a moment")
        return enqueue(message, delay=delay)

    stage.broker.enqueue = not_at_once
    stage.run()
    assert sorted(stage.names()) == sorted(told + ["gave_up"] * (len(errors) > 1))


def test_a_job_with_a_callback_is_no_plain_success():
    stage, plain = Told(), []

    class Looking(Middleware):
        def before_ack(self, broker, message):
            plain.append(message.delivery.is_plain_success())

    stage.broker.add_middleware(Looking())
    stage.job(on_success="done").send()
    stage.run()
    assert plain == [False, True]


def test_a_duplicate_and_a_redelivery_of_an_ended_job_send_no_callback():
    stage = Told()
    message = stage.job(**ALL, idempotency_key=lambda *args: "k").send()
    stage.run()
    stage.broker.enqueue(message)
    stage.broker.actors["job"].send()
    stage.run()
    assert stage.outcomes("job") == ["succeeded", "duplicate", "duplicate"]
    assert stage.names() == ["done"]


def test_a_job_whose_on_success_is_unknown_is_kept_as_a_dead_letter():
    stage = Told()
    stage.job(on_success="nobody").send()
    stage.run()
    assert stage.reasons() == ["handoff_failed"]
    (letter,) = stage.dead
    assert "on_success: this worker has no actor 'nobody'" in letter.options["failure"]["message"]


@pytest.mark.parametrize("option", ["on_failure", "on_retry_exhausted"])
def test_a_failed_job_whose_callback_is_unknown_ends_as_it_would_without_and_logged(option, caplog):
    stage = Told()
    stage.job(OSError(), OSError(), retry_on={OSError: TWICE}, **{option: "nobody"}).send()
    assert stage.run().outcomes() == ["retried", "dead"]
    assert f"{option}: this worker has no actor 'nobody'" in caplog.text


def test_a_result_that_can_not_be_sent_to_on_success_leaves_a_dead_letter(monkeypatch):
    monkeypatch.setattr(publishing, "_RETRY_REFUSAL_FOR", 0.05)
    monkeypatch.setattr(publishing, "_RETRY_PAUSES", (0.0, 0.01))
    stage = Told()
    stage.job(on_success="done", result=object()).send()
    assert stage.run().reasons() == ["handoff_failed"]
    assert len(stage.dead) == 1


def test_a_custom_callbacks_middleware_is_left_alone():
    class Own(StockCallbacks):
        pass

    own = Own()
    assert own in Stage(middleware=[own]).broker.middleware


# Options that a rule's retries leave in the message for others.


class Noting(Middleware):
    def __init__(self):
        self.options, self.attempts, self.runs = [], [], []

    def before_process_message(self, broker, message):
        if message.actor_name != "job":
            return
        self.options.append({key: message.options.get(key) for key in ("retries", "traceback", "requeue_timestamp")})
        self.attempts.append(attempt_of(message.options))
        self.runs.append(run_of(message.options))


def test_a_rules_retries_fill_the_options_that_dramatiqs_fill():
    noting = Noting()
    stage = Told(middleware=[noting])
    stage.job(OSError("disk"), OSError("full"), retry_on={OSError: RetryPolicy(attempts=3, wait=1)}).send()
    stage.run()
    first, second, third = noting.options
    assert first == {"retries": None, "traceback": None, "requeue_timestamp": None}
    assert (second["retries"], third["retries"]) == (1, 2)
    assert second["traceback"].endswith("OSError: disk\n")
    assert third["traceback"].endswith("OSError: full\n")
    assert third["requeue_timestamp"] >= second["requeue_timestamp"] > 10**12
    assert (noting.attempts, noting.runs) == ([1, 2, 3], [0, 1, 2])


@pytest.mark.parametrize("declared", [{"alert_on": OSError}, {"retry_on": {OSError: ONCE}}], ids=str)
def test_a_dead_letter_carries_the_last_traceback_where_dashboards_look_for_it(declared):
    stage = Told()
    stage.job(OSError("disk"), **declared).send()
    stage.run()
    (letter,) = stage.dead
    assert letter.options["traceback"].endswith("OSError: disk\n")
    assert letter.options["failure"]["attempts"] == 1


def test_max_retries_counts_dramatiqs_retries_and_not_those_of_rules():
    noting = Noting()
    stage = Told(middleware=[noting])
    errors = [OSError(), KeyError(), OSError(), KeyError(), OSError(), KeyError()]
    stage.job(*errors, **ALL, max_retries=2, retry_on={OSError: RetryPolicy(attempts=9, wait=1)}).send()
    stage.run()
    assert stage.outcomes("job") == ["retried"] * 5 + ["dead"]
    assert noting.options[5]["retries"] == 5
    assert noting.runs[:6] == [0, 1, 2, 3, 4, 5]
    assert [info for name, _, info in stage.told if name == "gave_up"] == [{"retries": 2, "max_retries": 2}]


def test_the_cap_on_all_attempts_counts_the_retries_of_rules_and_not_those_of_dramatiq():
    stage = Told(max_attempts=3)
    errors = [OSError(), KeyError(), KeyError(), OSError(), OSError()]
    stage.job(*errors, max_retries=9, retry_on={OSError: RetryPolicy(attempts=3, wait=1)}).send()
    assert stage.run().outcomes() == ["retried"] * 4 + ["dead"]


def test_a_message_that_0_1_0_has_retried_goes_on_where_it_was():
    noting = Noting()
    stage = Told(middleware=[noting])
    job = stage.job(OSError(), OSError(), OSError(), retry_on={OSError: RetryPolicy(attempts=4, wait=1)})
    carried = {"runs": {"another rule": [1, 1]}, "total": 1, "history": []}
    stage.broker.enqueue(job.message().copy(options={"policies": carried}))
    stage.run()
    assert noting.runs == [1, 2, 3, 4]
    assert noting.attempts == [2, 3, 4, 5]
    assert [options["retries"] for options in noting.options] == [None, 1, 2, 3]


@pytest.mark.parametrize("refused", [False, True], ids=["accepted at once", "at the second try"])
def test_callbacks_are_published_before_the_key_records_the_end_of_the_run(monkeypatch, refused):
    order, stage = [], Told()
    stage.job(OSError(), **ALL, idempotency_key=lambda *args: "k", retry_on={OSError: TWICE}).send()
    enqueue, ending, left = stage.broker.enqueue, Claims.record_ending, [1] if refused else []

    def noting(message, *, delay=None):
        if message.actor_name == "failed" and left:
            left.pop()
            raise ConnectionError("lost for a moment")
        order.append(message.actor_name)
        return enqueue(message, delay=delay)

    def noting_the_end(claims, claim, send):
        order.append("ended")
        ending(claims, claim, send)

    stage.broker.enqueue = noting
    monkeypatch.setattr(Claims, "record_ending", noting_the_end)
    stage.run()
    assert order[:3] == ["failed", "ended", "job"]
    assert sorted(stage.names()) == ["done", "failed"]
