"""Django's tasks on Dramatiq, from `enqueue` to the stored result."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
from django.tasks import TaskResultStatus, default_task_backend, task_backends
from django.tasks.exceptions import InvalidTask, InvalidTaskBackend, TaskResultDoesNotExist
from django.tasks.signals import task_enqueued, task_finished, task_started
from django.test import override_settings
from django.utils import timezone
from dramatiq import Message
from dramatiq.brokers.stub import StubBroker
from dramatiq.results import Results
from dramatiq.results.backends import StubBackend

from dramatiq_policies import ConfigurationError, install
from dramatiq_policies.contrib.django.tasks import DramatiqBackend
from dramatiq_policies.testing import drain, stub

from .conftest import stub_broker
from .project import OURS

READY, FAILED, SUCCESSFUL = TaskResultStatus.READY, TaskResultStatus.FAILED, TaskResultStatus.SUCCESSFUL


@pytest.fixture
def signals():
    """Each signal of a task, with the state at that time."""
    seen = []

    def receiver(name):
        return lambda task_result, **kwargs: seen.append((name, str(task_result.status), task_result.attempts))

    receivers = {
        signal: receiver(name)
        for signal, name in ((task_enqueued, "enqueued"), (task_started, "started"), (task_finished, "finished"))
    }
    for signal, one in receivers.items():
        signal.connect(one, sender=DramatiqBackend)
    yield seen
    for signal, one in receivers.items():
        signal.disconnect(one, sender=DramatiqBackend)


def queued(broker, queue="default"):
    return [Message.decode(body) for body in tuple(broker.queues[queue].queue)]


def test_a_task_is_an_actor_with_the_task_s_queue_and_the_options_of_its_policy(broker, tasks):
    tasks.send_mail.enqueue("ada")
    actor = broker.get_actor("tests.contrib.django.shop.tasks.send_mail")
    assert actor.queue_name == "mail"
    assert actor.priority == -7  # Dramatiq begins with the lowest.
    assert actor.options["timeout"] == timedelta(seconds=30)
    assert tasks.Unreachable in actor.options["retry_on"]


def test_an_enqueued_task_is_ready_then_runs_and_its_result_can_be_read(broker, tasks, signals):
    before = timezone.now()
    result = tasks.send_mail.enqueue("ada", text="hello")
    assert result.status == READY
    assert before <= result.enqueued_at <= timezone.now()
    assert default_task_backend.get_result(result.id) == result
    drain(broker).assert_outcomes(tasks.send_mail.module_path, "succeeded")
    assert tasks.done == [("ada", "hello")]
    stored = tasks.send_mail.get_result(result.id)
    assert stored.status == SUCCESSFUL
    assert stored.return_value == {"to": "ada"}
    assert (stored.args, stored.kwargs) == (["ada"], {"text": "hello"})
    assert stored.task == tasks.send_mail
    assert stored.enqueued_at == result.enqueued_at <= stored.started_at <= stored.finished_at
    assert stored.attempts == 1
    assert signals == [("enqueued", "READY", 0), ("started", "RUNNING", 1), ("finished", "SUCCESSFUL", 1)]


def test_a_task_whose_rule_retries_it_is_ready_again_and_finishes_once(broker, tasks, signals):
    result = tasks.notice.enqueue(1, fail=2)
    drain(broker, until=1_500)
    result.refresh()
    assert result.status == READY
    assert result.finished_at is None
    assert [error.exception_class for error in result.errors] == [tasks.Unreachable] * 2
    started = result.started_at
    drain(broker).assert_outcomes(tasks.notice.module_path, "succeeded")
    result.refresh()
    assert result.status == SUCCESSFUL
    assert result.attempts == 3
    assert len(result.errors) == 2
    assert result.started_at == started < result.last_attempted_at
    assert [name for name, _, _ in signals] == ["enqueued", "started", "started", "started", "finished"]


@pytest.mark.parametrize("stored", [True, False])
def test_a_copy_of_a_run_whose_retry_waits_does_not_finish_the_task(set_broker, results, signals, stored):
    broker = stub_broker(Results(backend=results, store_results=stored))
    tasks = set_broker(broker)
    tasks.notice.enqueue(1, fail=1)
    (first,) = queued(broker)
    drain(broker, until=timedelta(seconds=0.5))
    broker.enqueue(first)
    drain(broker, until=timedelta(seconds=0.1)).assert_outcomes(tasks.notice.module_path, "duplicate")
    if stored:
        assert default_task_backend.get_result(first.message_id).status == READY
    drain(broker)
    assert [(name, attempt) for name, _, attempt in signals if name != "enqueued"] == [
        ("started", 1),
        ("started", 2),
        ("finished", 2),
    ]


def test_without_stored_results_a_task_still_knows_its_attempt_and_finishes_once(set_broker, signals):
    broker = stub_broker()
    tasks = set_broker(broker)
    result = tasks.notice.enqueue(1, fail=2)
    drain(broker)
    assert [attempt for attempt, _, _ in tasks.done] == [1, 2, 3]
    assert {found for _, found, _ in tasks.done} == {result.id}
    assert signals[-1] == ("finished", "SUCCESSFUL", 3)
    assert [name for name, _, _ in signals].count("finished") == 1


@pytest.mark.parametrize("stored", [True, False])
def test_a_task_that_fails_permanently_has_failed_with_its_traceback(set_broker, results, signals, caplog, stored):
    broker = stub_broker(Results(backend=results, store_results=stored))
    tasks = set_broker(broker)
    finished = []

    def receiver(task_result, **kwargs):
        finished.append(task_result)

    task_finished.connect(receiver)
    try:
        result = tasks.divide.enqueue(1, 0)
        drain(broker).assert_outcomes(tasks.divide.module_path, "discarded")
    finally:
        task_finished.disconnect(receiver)
    (failed,) = finished
    assert failed.id == result.id
    assert failed.status == FAILED
    assert failed.started_at <= failed.finished_at
    (error,) = failed.errors
    assert error.exception_class is ZeroDivisionError
    assert error.traceback.endswith("ZeroDivisionError: division by zero\n")
    assert signals[-1] == ("finished", "FAILED", 1)
    (record,) = [one for one in caplog.records if one.name == "django.tasks" and one.levelname == "ERROR"]
    assert record.exc_info[0] is ZeroDivisionError
    if stored:
        assert default_task_backend.get_result(result.id) == failed
        with pytest.raises(ValueError, match="Task failed"):
            default_task_backend.get_result(result.id).return_value  # noqa: B018


def test_a_return_value_that_is_not_json_fails_the_task(broker, tasks):
    result = tasks.not_json.enqueue()
    drain(broker).assert_outcomes(tasks.not_json.module_path, "dead")
    result.refresh()
    assert result.status == FAILED
    assert result.errors[0].exception_class is TypeError


@pytest.mark.parametrize("option", [{"retry_on": "no class"}, {"retry_onn": ConnectionError}])
def test_a_wrong_option_of_a_policy_fails_where_the_task_is_declared(broker, tasks, monkeypatch, option):
    monkeypatch.setattr(tasks.add.func, "dramatiq_policies_options", option, raising=False)
    with pytest.raises((ConfigurationError, ValueError), match="retry_on"):
        task_backends["default"].validate_task(tasks.add)


def test_an_argument_that_is_not_json_is_refused_and_nothing_is_sent(broker, tasks):
    with pytest.raises(TypeError, match="Unsupported type"):
        tasks.add.enqueue(timezone.now(), 1)
    assert queued(broker) == []


def test_run_after_delays_a_task_from_its_enqueue_on(broker, tasks):
    result = tasks.add.using(run_after=timezone.now() + timedelta(hours=2)).enqueue(1, 2)
    (message,) = queued(broker, "default.DQ")
    assert message.options["eta"] / 1_000 - time.time() == pytest.approx(7_200, abs=5)
    drain(broker, until=timedelta(hours=1))
    # Its result is kept although results are kept for ten minutes.
    assert default_task_backend.get_result(result.id).status == READY
    run = drain(broker)
    assert run.elapsed == pytest.approx(3_600_000, abs=5_000)
    stored = default_task_backend.get_result(result.id)
    assert stored.return_value == 3
    assert stored.task.run_after == result.task.run_after


def test_a_time_that_has_passed_is_no_delay(broker, tasks):
    tasks.add.using(run_after=timezone.now() - timedelta(hours=2)).enqueue(1, 2)
    assert len(queued(broker)) == 1


@pytest.mark.parametrize(("priority", "sent"), [(-100, 0), (-50, 2), (0, 5), (7, 5), (60, 8), (100, 10)])
def test_a_priority_is_mapped_to_the_priorities_of_rabbitmq(broker, tasks, priority, sent):
    broker.max_priority = 10
    result = tasks.add.using(priority=priority).enqueue(1, 2)
    (message,) = queued(broker)
    assert message.options["broker_priority"] == sent
    assert default_task_backend.get_result(result.id).task.priority == priority


def test_a_broker_without_priorities_keeps_a_task_s_priority_in_its_result(broker, tasks):
    result = tasks.add.using(priority=-3).enqueue(1, 2)
    (message,) = queued(broker)
    assert "broker_priority" not in message.options
    drain(broker)
    assert default_task_backend.get_result(result.id).task.priority == -3


def test_a_task_may_use_each_queue_of_the_setting_and_workers_read_all_of_them(broker, tasks):
    tasks.add.using(queue_name="slow").enqueue(1, 2)
    assert len(queued(broker, "slow")) == 1
    assert {"default", "mail", "slow"} <= broker.get_declared_queues()
    drain(broker).assert_outcomes(tasks.add.module_path, "succeeded")
    with pytest.raises(InvalidTask, match="Queue 'other' is not valid for backend"):
        tasks.add.using(queue_name="other")


def test_a_queue_with_a_name_that_dramatiq_refuses_is_invalid(tasks):
    with pytest.raises(InvalidTask, match="'my queue' is not a name that Dramatiq accepts"):
        tasks.add.using(backend="any", queue_name="my queue")


def test_a_task_gets_its_context_and_its_key_template_knows_no_context(broker, tasks, signals):
    first = tasks.notice.enqueue(5)
    second = tasks.notice.enqueue(5)
    drain(broker).assert_outcomes(tasks.notice.module_path, "succeeded", "duplicate")
    ((attempt, found, workers),) = tasks.done
    assert (attempt, found) == (1, first.id)
    assert len(workers) == 1
    second.refresh()
    assert (second.status, second.started_at, second.return_value) == (SUCCESSFUL, None, None)
    assert [name for name, _, _ in signals] == ["enqueued", "enqueued", "started", "finished", "finished"]


def test_an_async_task_runs_on_the_worker_s_loop(broker, tasks):
    result = tasks.fetch.enqueue(4)
    drain(broker)
    result.refresh()
    assert result.return_value == [4, [4]]


async def _enqueue(task, *args):
    result = await task.aenqueue(*args)
    return result, await default_task_backend.aget_result(result.id)


def test_aenqueue_and_aget_result_do_as_their_sync_versions(broker, tasks):
    import asyncio

    result, found = asyncio.run(_enqueue(tasks.add, 1, 2))
    assert found == result
    drain(broker).assert_outcomes(tasks.add.module_path, "succeeded")


def test_an_async_task_without_the_asyncio_middleware_is_invalid(set_broker):
    tasks = set_broker(install(StubBroker(middleware=[])))
    with pytest.raises(InvalidTask, match="AsyncIO middleware"):
        tasks.fetch.enqueue(4)
    tasks.add.enqueue(1, 2)


def test_an_unknown_an_expired_and_a_renamed_task_have_no_result(broker, tasks, results, monkeypatch):
    with pytest.raises(TaskResultDoesNotExist):
        default_task_backend.get_result("123")
    result = tasks.add.enqueue(1, 2)
    monkeypatch.delattr(tasks, "add")
    with pytest.raises(TaskResultDoesNotExist, match=result.id):
        default_task_backend.get_result(result.id)
    results.results.clear()
    with pytest.raises(TaskResultDoesNotExist):
        default_task_backend.get_result(result.id)


def test_without_results_on_the_broker_get_result_is_not_supported(set_broker, broker):
    set_broker(stub_broker())
    assert not default_task_backend.supports_get_result
    with pytest.raises(NotImplementedError):
        default_task_backend.get_result("123")
    set_broker(broker)
    assert default_task_backend.supports_get_result


def test_a_task_without_store_results_leaves_no_result(set_broker, results):
    broker = stub_broker(Results(backend=results))
    tasks = set_broker(broker)
    result = tasks.add.enqueue(1, 2)
    drain(broker).assert_outcomes(tasks.add.module_path, "succeeded")
    with pytest.raises(TaskResultDoesNotExist):
        default_task_backend.get_result(result.id)


class DownBackend(StubBackend):
    def _get(self, key):
        raise ConnectionError("refused")

    def _store(self, key, result, ttl):
        raise ConnectionError("refused")


def test_a_task_runs_although_its_result_can_t_be_stored(set_broker, monkeypatch, caplog):
    monkeypatch.setattr("dramatiq_policies.middleware.composition._STORE_PAUSES", ())
    broker = stub_broker(Results(backend=DownBackend(), store_results=True))
    tasks = set_broker(broker)
    tasks.add.enqueue(1, 2)
    drain(broker).assert_outcomes(tasks.add.module_path, "succeeded")
    texts = [record.getMessage() for record in caplog.records if record.name == "dramatiq_policies.django"]
    assert len([text for text in texts if "can't be stored (refused)" in text]) == 3


def test_a_receiver_that_fails_changes_nothing(broker, tasks):
    def receiver(**kwargs):
        raise RuntimeError("a bug")

    for signal in (task_started, task_finished):
        signal.connect(receiver)
    try:
        tasks.send_mail.enqueue("ada")
        drain(broker).assert_outcomes(tasks.send_mail.module_path, "succeeded")
    finally:
        for signal in (task_started, task_finished):
            signal.disconnect(receiver)
    assert len(tasks.done) == 1


def test_a_task_that_snoozes_is_ready_without_an_error(broker, tasks, signals):
    result = tasks.snooze_once.enqueue()
    drain(broker, until=1_000)
    result.refresh()
    assert (result.status, result.errors) == (READY, [])
    drain(broker)
    result.refresh()
    assert result.status == SUCCESSFUL
    assert [name for name, _, _ in signals] == ["enqueued", "started", "started", "finished"]


def test_a_task_sent_as_a_plain_message_runs_with_the_known_fields(broker, tasks, signals):
    tasks.notice.enqueue(1)
    drain(broker)
    message = broker.get_actor(tasks.notice.module_path).send(2)
    drain(broker).assert_outcomes(tasks.notice.module_path, "succeeded")
    stored = default_task_backend.get_result(message.message_id)
    assert stored.status == SUCCESSFUL
    assert stored.enqueued_at == message.message_datetime


def test_a_task_declared_for_another_backend_is_refused_because_no_worker_knows_it(broker, tasks):
    with pytest.raises(InvalidTask, match=r"declared for the backend 'immediate'.*@task\(backend='default'\)"):
        tasks.of_another_backend.using(backend="default")
    assert tasks.of_another_backend.module_path not in broker.actors


def test_a_broker_without_dramatiq_policies_is_refused(set_broker, broker):
    tasks = set_broker(broker)
    set_broker(StubBroker())
    with pytest.raises(ConfigurationError, match="no middleware of dramatiq_policies"):
        tasks.add.enqueue(1, 2)


def test_options_of_the_backend_are_refused(tasks):
    with (
        override_settings(TASKS={"default": {"BACKEND": OURS, "OPTIONS": {"retry_on": 1}}}),
        pytest.raises(InvalidTaskBackend, match="takes no OPTIONS"),
    ):
        task_backends["default"]


def test_the_kit_runs_tasks_on_its_stub_broker(broker, tasks, signals):
    tasks.send_mail.enqueue("ada")
    broker.flush_all()
    with stub(broker) as stand_in:
        result = tasks.send_mail.enqueue("bob")
        drain(stand_in).assert_outcomes(tasks.send_mail.module_path, "succeeded")
        assert default_task_backend.get_result(result.id).status == SUCCESSFUL
    assert tasks.done == [("bob", "")]
    assert signals[-1] == ("finished", "SUCCESSFUL", 1)


def test_a_message_with_strange_fields_of_a_task_runs(broker, tasks):
    tasks.add.enqueue(1, 2)
    broker.flush_all()
    actor = broker.get_actor(tasks.add.module_path)
    for fields in ("text", {}, {"enqueued_at": 3, "run_after": "tomorrow"}):
        message = actor.send_with_options(args=(1, 2), django_task=fields)
        drain(broker).assert_outcomes(actor, "succeeded")
        assert default_task_backend.get_result(message.message_id).return_value == 3
